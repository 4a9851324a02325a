"""The command line and a run's folder, which a reader of the paper may skip: srpo.py is the paper.

    python run.py train TASK [--seeds 0 1 2 3 4 5] [--out runs] [--beta X] ...
    python run.py evaluate runs/TASK [--method srpo] [--episodes N]

A run's folder has config.json, log.csv, scores.csv, a .pt file a stage, and checkpoint.pt, from which the
same command goes on.
"""

import argparse
import contextlib
import csv
import dataclasses
import errno
import fcntl
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import UserError
from diffusion import sample
from srpo import STAGES, Settings, layouts

POLICIES = ("srpo", "iql", "bc")  # the stages that train one
COLUMNS = {
    "log": ("stage", "step", "seed", "beta", "alive", "value_loss", "q_loss", "behavior_loss", "policy_loss",
            "regression_loss", "q", "v", "grad_q", "noise_gap"),
    "scores": ("method", "step", "seed", "beta", "episode", "return", "score"),
}  # fmt: skip
COMPILE_FROM = 20_000  # steps of a stage from which on compiling pays on a CPU
THREADS = torch.get_num_threads()  # of a compiled step on a CPU: PyTorch's own choice


# ----------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path):
    """What keeps a run's file from being written is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); what was saved before is intact"
        ) from None


def flush(file):
    """Onto the disk, where the file system has that."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def write_atomically(path, content):
    """Bytes into a temporary file, flushed, then renamed: `path` is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                flush(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_tensors(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def save_json(path, value):
    write_atomically(path, json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a run's file is told in one line: damaged ones fail in many ways."""
    try:
        yield
    except (
        UserError,
        MemoryError,
        torch.OutOfMemoryError,
        torch.AcceleratorError,
    ):  # no fault of the file's
        raise
    except FileNotFoundError as error:
        cure = (
            ": train it first"
            if error.filename == str(path)
            else f"; {path} itself may be intact"
        )
        raise UserError(f"{error.filename} does not exist{cure}") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error}); the file itself may be intact"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__} {error}"[:120]
        raise UserError(
            f"{path} is damaged or not ours ({reason}); choose another --out"
        ) from None


def load_tensors(path, device="cpu"):
    """What torch.save wrote, tensors and plain values only; UserError for anything else."""
    with reading(path):
        file = io.BytesIO(path.read_bytes())
        if zipfile.ZipFile(file).testzip():  # torch.load doesn't look at checksums
            raise ValueError("other bytes than were written")
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def read_config(folder):
    """A run folder's config.json; UserError where it is missing, damaged or not ours."""
    path = Path(folder) / "config.json"
    with reading(path):
        config = json.loads(path.read_text())
        settings = Settings(**config["settings"]).resolve(
            data.check_task(config["task"])
        )
        config["settings"] = json.loads(
            json.dumps(vars(settings))
        )  # what it lacks is as by default
        if not config["seeds"] or not all(
            type(seed) is int for seed in config["seeds"]
        ):
            raise ValueError("seeds must be whole numbers")
        (
            float(config["data"]["data_score"]),
            float(config["data"]["largest_reward"]),
            config["data"]["kind"],
        )
        return config


def read_csv(path):
    """The rows of log.csv or scores.csv, numbers as float, empty fields None; without half a last line."""
    with reading(path):
        lines = [
            line
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        rows = list(csv.DictReader(lines, restval="missing"))
        if any(tuple(row) != COLUMNS[path.stem] for row in rows):
            raise ValueError("other columns")
        words = ("stage", "method")
        return [
            {
                key: x if key in words else float(x) if x else None
                for key, x in row.items()
            }
            for row in rows
        ]


# ---------------------------------------------------------------------------------------------------- scores


def score_rows(task, method, step, members, returns):
    """The rows of scores.csv for returns [members, episodes]; members: (beta, seed) of each policy."""
    scores, rows = data.normalized_score(task, returns), []
    for (beta, seed), *episodes in zip(members, returns.tolist(), scores.tolist()):
        for episode, pair in enumerate(zip(*episodes)):
            rows.append(
                dict(zip(COLUMNS["scores"], (method, step, seed, beta, episode, *pair)))
            )
    return rows


def by_policy(rows):
    """{(method, beta): {step: {seed: [scores]}}} of rows of scores."""
    policies = {}
    for row in rows:
        steps = policies.setdefault((row["method"], row["beta"]), {})
        steps.setdefault(row["step"], {}).setdefault(row["seed"], []).append(
            row["score"]
        )
    return policies


def print_scores(folder, config, rows):
    """A line a policy: mean and standard deviation over the seeds' mean scores at the last step."""
    kind = config["data"]["kind"]
    title = config["task"] + ("" if kind == "D4RL" else f" ({kind} data)")
    for (method, beta), steps in by_policy(rows).items():
        seeds = [*steps.values()][-1]
        means = np.array([np.mean(scores) for scores in seeds.values()])
        name, each = (
            f"{method}, β = {beta:g}" if beta else method,
            " ".join(f"{mean:.1f}" for mean in means),
        )
        size = f"{len(means)} seeds of {len([*seeds.values()][0])} episodes"
        print(
            f"{title} {name}: {means.mean():.1f} ± {means.std():.1f} over {size} ({each})"
        )
    if not (path := folder / "log.csv").exists():
        return
    with reading(path):
        log = read_csv(path)
        stopped = dict.fromkeys(
            (row["stage"], int(row["seed"])) for row in log if not row["alive"]
        )
    for stage, seed in stopped:
        print(
            f"{title}: the {stage} stage of seed {seed} stopped, its loss not finite; its score counts"
        )


# ----------------------------------------------------------------------------------------------------- a run


def progress(what, unit, total, done=0):
    """A tqdm bar; without a terminal, a line every 30 seconds."""
    seconds = 1 if sys.stderr.isatty() else 30
    how = {
        "unit": unit,
        "unit_scale": True,
        "smoothing": 0.05,
        "mininterval": seconds,
        "maxinterval": 60,
    }
    return tqdm(desc=what, total=total, initial=done, **how)


def differences(config, other, keys):
    """Which of these facts and settings, if any, are not the same in two configs."""
    config, other = ({**one, **one["settings"]} for one in (config, other))
    return ", ".join([key for key in keys if config.get(key) != other.get(key)][:4])


def numpy_policy(tensors):
    """A policy to roll out, from a policy network's state dict."""
    arrays = [tensor.numpy() for tensor in tensors.values()]
    return data.NumpyPolicy([*zip(arrays[::2], arrays[1::2])])


@contextlib.contextmanager
def locked(folder):
    """Makes the folder, and keeps other processes out of it, or says that its file system can't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another --out"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use by {file.read()}") from None
        except OSError as error:
            print(
                f"{folder} can't be locked ({error.strerror}): let no other process train there"
            )
        with contextlib.suppress(OSError):  # this is for whoever comes second
            file.truncate(0)
            print(
                f"process {os.getpid()} on {platform.node()}",
                file=file,
                end="",
                flush=True,
            )
        yield


class Run:
    """A task's folder under way. Its checkpoint has the names of finished stages, the tensors and the step of
    the one that isn't, and the sizes of the CSV files.
    """

    def __init__(self, folder, config, checkpoint_minutes, any_device):
        self.folder, self.minutes, self.signal, self.printed = (
            folder,
            checkpoint_minutes,
            None,
            set(),
        )
        self.config, self.checkpoint = config, folder / "checkpoint.pt"
        same = {*config["settings"], "task", "data", "seeds", "torch"} - {
            "also"
        }  # a policy more is welcome
        same = sorted(same if any_device else same | {"device"})
        if (folder / "config.json").exists():
            self.config = read_config(folder)
            if differ := differences(config, self.config, same):
                raise UserError(
                    f"{folder} holds a run of another {differ}; choose another --out"
                )
            also = {*config["settings"]["also"], *self.config["settings"]["also"]}
            self.config["settings"]["also"] = sorted(also)
        self.saved = {
            "finished": [],
            "stage": "",
            "sizes": dict.fromkeys(COLUMNS, 0),
            "config": config,
        }
        if self.checkpoint.exists():
            self.saved = load_tensors(self.checkpoint)
        elif any((folder / f"{name}.pt").exists() for name in STAGES):
            raise UserError(
                f"{self.checkpoint}, by which this run goes on, is missing; choose another --out"
            )
        with reading(self.checkpoint):
            if differ := differences(config, self.saved["config"], same):
                raise ValueError(f"of a run of another {differ}")
            self.saved["finished"] = list(self.saved["finished"])
            for name in COLUMNS:
                self.cut(name, int(self.saved["sizes"][name]))
        save_json(folder / "config.json", self.config)
        if not self.checkpoint.exists():
            self.save()

    def cut(self, name, size):
        """Cuts a CSV file to what the checkpoint knows of it."""
        with (
            writing(path := self.folder / f"{name}.csv"),
            open(path, "a+", newline="") as file,
        ):
            longer = file.tell() >= size
            file.seek(max(0, size - 1))
            if size and not (longer and file.read(1) == "\n"):
                raise UserError(
                    f"{path} is not as this run left it; put it back, or choose another --out"
                )
            file.truncate(size)
            if size == 0:
                csv.writer(file).writerow(COLUMNS[name])

    def add(self, name, rows):
        """More rows for a CSV file, on the disk before they count."""
        with (
            writing(path := self.folder / f"{name}.csv"),
            open(path, "a", newline="") as file,
        ):
            csv.DictWriter(file, COLUMNS[name]).writerows(rows)

    @contextlib.contextmanager
    def signals(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 make the loop save and stop, a second Ctrl-C at once."""

        def ask(number, frame):
            if self.signal == number == signal.SIGINT:
                os._exit(128 + number)
            self.signal = self.signal or (
                signal.SIGTERM if number == signal.SIGUSR1 else number
            )

        main_thread = (
            threading.current_thread() is threading.main_thread()
        )  # no other may ask for signals
        numbers = data.SIGNALS if main_thread else ()
        before = [signal.signal(number, ask) for number in numbers]
        try:
            yield
        except BrokenExecutor:  # workers that were just starting got the signal too
            if self.signal:
                raise SystemExit(128 + self.signal) from None
            raise
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def save(self, **changes):
        """The checkpoint with these changes, and with the CSV files as they stand on the disk."""
        self.saved |= changes
        for name in COLUMNS:
            with writing(path := self.folder / f"{name}.csv"), open(path, "rb") as file:
                flush(file)
                self.saved["sizes"][name] = file.seek(0, os.SEEK_END)
        save_tensors(self.checkpoint, self.saved)

    def finish(self, name, weights):
        """A stage's result: its file first, then the checkpoint, by which it counts."""
        save_tensors(self.folder / f"{name}.pt", weights)
        self.save(finished=[*self.saved["finished"], name], stage="", state={})

    def reuse(self, name, folder):
        """Takes the critic or behavior model of a run of the same task, data, seeds and settings."""
        keys = [
            key
            for key in self.config["settings"]
            if key.startswith(("critic", "behavior"))
        ]
        keys += [
            "task",
            "seeds",
            "data",
            "tau",
            "gamma",
            "target_rate",
            "dropout",
            "precision",
        ]
        if differ := differences(self.config, read_config(folder), keys):
            raise UserError(f"--reuse {folder}: that run has another {differ}")
        if name not in self.saved["finished"]:
            self.add(
                "log",
                [row for row in read_csv(folder / "log.csv") if row["stage"] == name],
            )
            self.finish(name, load_tensors(folder / f"{name}.pt"))

    def resume(self, stage):
        """Puts the checkpoint's tensors into a stage; the step of its last evaluation."""
        with reading(self.checkpoint):
            for name in stage.changing:
                stage.state[name].copy_(
                    self.saved["state"][name].reshape(stage.state[name].shape)
                )
            stage.count.copy_(self.saved["count"])
            if not 0 <= int(stage.count) <= stage.steps:
                raise ValueError(f"step {int(stage.count)}")
            return int(self.saved["evaluated"])

    def train(self, stage, workers, compiled):
        """Takes a stage from where it stands to its end, with logs, evaluations and checkpoints."""
        evaluated = self.resume(stage) if self.saved["stage"] == stage.name else -1
        by_default = stage.table.is_cuda or stage.steps >= COMPILE_FROM
        compiling = by_default if compiled is None else compiled
        parts = self.config["settings"]["evaluations"] if stage.name in POLICIES else 0
        marks = {round(i * stage.steps / parts) for i in range(parts + 1) if parts}
        every, members = max(1, min(1000, stage.steps // 20)), len(stage.members)
        done, saved_at = int(stage.count), time.monotonic()
        with progress(
            stage.name, " seed-steps", members * stage.steps, members * done
        ) as bar:
            while done < stage.steps or evaluated < max(marks, default=-1):
                if done in marks and evaluated < done:
                    evaluated = (
                        done if self.evaluate(stage, done, workers) else evaluated
                    )
                else:
                    stops = {*marks, stage.steps, (done // every + 1) * every}
                    stop = min(stop for stop in stops if stop > done)
                    steps = (
                        self.compile(stage, compiled)
                        if compiling
                        else stage.advance(stop - done)
                    )
                    done, compiling = done + steps, False
                    bar.update(members * steps)
                    if done % every == 0 or done == stage.steps:
                        bar.set_postfix_str(
                            self.write_log(stage, done, done % every or every),
                            refresh=False,
                        )
                if self.signal or time.monotonic() - saved_at > 60 * self.minutes:
                    state = {name: stage.state[name] for name in stage.changing}
                    self.save(
                        stage=stage.name,
                        count=stage.count,
                        state=state,
                        evaluated=evaluated,
                    )
                    saved_at = time.monotonic()
                if self.signal:
                    tqdm.write(
                        f"saved at step {done} of {stage.name}; the same command goes on from there"
                    )
                    raise SystemExit(128 + self.signal)
        self.finish(stage.name, stage.weights())

    def compile(self, stage, required):
        """Compiles a stage's step, or says why not and stays eager, and takes one; returns 1."""
        torch.set_num_threads(THREADS)
        try:
            stage.compile()
        except torch.OutOfMemoryError:
            raise
        except (torch._dynamo.exc.TorchDynamoException, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split("\n\nSet TORCHDYNAMO")[0].split())[-200:]
            reason += "" if shutil.which("g++") else "; install g++, a C++ compiler"
            if required:
                raise UserError(f"--compile cannot work here: {reason}") from None
            tqdm.write(f"{stage.name}: not compiled, which costs speed only: {reason}")
            torch.set_num_threads(1)
            stage.step()
        return 1

    def write_log(self, stage, step, since):
        """A row a seed: mean losses since the last row, and what is worth watching; returns their means."""
        losses, alive = (
            (stage.state["losses"] / since).tolist(),
            stage.state["alive"].tolist(),
        )
        stage.state["losses"].zero_()
        watched = {name: column.tolist() for name, column in stage.watch().items()}
        bound, rows = (
            self.config["data"]["largest_reward"]
            / (1 - self.config["settings"]["gamma"]),
            [],
        )
        for i, (beta, seed) in enumerate(stage.members):
            values = dict(
                zip(
                    (*stage.loss_names, *watched),
                    (*losses[i], *[x[i] for x in watched.values()]),
                )
            )
            rows.append(
                dict(zip(COLUMNS["log"], (stage.name, step, seed, beta, int(alive[i]))))
                | values
            )
            name = f"seed {seed}{f', β = {beta}' if beta else ''}"
            if not alive[i]:
                self.tell(
                    f"{name}: a {stage.name} loss is not finite; stopped at its last finite weights"
                )
            elif stage.name == "critic" and abs(values["q"]) > bound:
                self.tell(
                    f"{name}: the critic diverges: Q is beyond {bound:.3g}, the largest return"
                )
        self.add("log", rows)
        if not any(alive):
            sys.stderr.write(
                f"run: no seed's {stage.name} loss is finite; see {self.folder / 'log.csv'}\n"
            )
            raise SystemExit(3)
        return ", ".join(
            f"{name} {np.mean([row[name] for row in rows]):.3g}" for name in values
        )

    def tell(self, line):
        """Prints a line the first time."""
        if line not in self.printed:
            self.printed.add(line)
            tqdm.write(line)

    def evaluate(self, stage, step, workers):
        """Scores a stage's policies; false if a signal came before that was done."""
        task, policies = self.config["task"], []
        for (_, seed), weights in zip(stage.members, stage.state["theta"].cpu()):
            policies.append((seed, numpy_policy(stage.policy.tensors(weights))))
        episodes = workers.roll_out(task, policies, self.config["settings"]["episodes"])
        while not all(future.done() for row in episodes for future in row):
            if self.signal:
                return False
            time.sleep(0.01)
        returns, broken = data.returns_of(episodes)
        rows = score_rows(task, stage.name, step, stage.members, returns)
        self.add("scores", rows)
        tqdm.write(
            f"{stage.name}: mean score {np.mean([row['score'] for row in rows]):.1f} at step {step}"
        )
        if broken:
            self.tell(
                f"{stage.name}: MuJoCo gave up on {broken} episodes, which count until there"
            )
        return True


def train(
    task,
    settings,
    seeds,
    out,
    device,
    compile,
    checkpoint_minutes,
    reuse,
    any_data,
    workers,
):
    """Algorithm 1 on one task: trains what is not yet trained and writes everything under OUT/TASK."""
    folder, chosen = (
        out / task,
        device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    name = (
        torch.cuda.get_device_name()
        if chosen == "cuda"
        else f"a CPU, at most {THREADS} threads"
    )
    print(f"{task}: training on {name}")
    if task == data.DEMO and not data.data_file(task).exists():
        import remake

        remake.maze2d(data.stand_in_path(task))
    dataset = data.load(task, any_data)
    config = {
        **{
            "task": task,
            "seeds": seeds,
            "settings": dataclasses.asdict(settings),
            "data": dataset.info,
        },
        **{"device": chosen, "device_name": name, "python": platform.python_version()},
        **{"torch": torch.__version__, "numpy": np.__version__},
    }
    fast = chosen == "cuda" and settings.precision == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    with locked(folder):
        run = Run(
            folder,
            json.loads(json.dumps(config)),
            checkpoint_minutes,
            any_device=device is not None,
        )
        with run.signals(), data.Workers(workers) as workers:
            for name in ("critic", "behavior") if reuse else ():
                run.reuse(name, reuse)
            table = torch.from_numpy(dataset.table).to(chosen)
            wanted = "critic", "behavior", "srpo", *run.config["settings"]["also"]
            todo = [
                name
                for name in STAGES
                if name in wanted and name not in run.saved["finished"]
            ]
            for name in sorted(
                todo, key=lambda name: (name in POLICIES, name != run.saved["stage"])
            ):
                torch.set_num_threads(
                    1
                )  # until it is compiled: the same bits on any number of cores
                before = ("critic", "behavior") if name in POLICIES else ()
                trained = [
                    load_tensors(folder / f"{other}.pt", chosen) for other in before
                ]
                both = f"{folder / 'critic.pt'} or behavior.pt"
                with reading(both) if before else contextlib.nullcontext():
                    stage = STAGES[name](
                        settings, table, dataset.sizes, seeds, *trained
                    )
                run.train(stage, workers, compile)
    if not todo:
        print(f"{folder} is finished: nothing to do")
    print_scores(folder, run.config, read_csv(folder / "scores.csv"))


# -------------------------------------------------------------------------------------------------- evaluate


class IDQL:
    """IDQL's policy (Hansen-Estruch et al., 2023): of actions drawn from the behavior, the best by Q."""

    def __init__(self, noise_model, q, a_dim, candidates=32, steps=15):
        self.noise_model, self.q, self.shape, self.steps = (
            noise_model,
            q,
            (candidates, a_dim),
            steps,
        )

    def __call__(self, obs, rng):
        noise = torch.from_numpy(rng.standard_normal(self.shape, np.float32))
        s = torch.as_tensor(obs, dtype=torch.float32).expand(len(noise), -1)
        with torch.no_grad():
            a = sample(self.noise_model, s, noise, self.steps).clamp(-1, 1)
            return a[self.q(s, a).amin(-2).argmax()].numpy()


def load_policies(folder, config, method):
    """A trained run's policies: their (beta, seed), and (seed, policy) as Workers.roll_out takes them."""
    settings, (s_dim, a_dim) = (
        Settings(**config["settings"]),
        data.space_sizes(config["task"]),
    )
    _, q, noise_model, policy = layouts(settings, s_dim, a_dim).values()
    betas = settings.beta if method == "srpo" else [None]
    members = [(beta, seed) for beta in betas for seed in config["seeds"]]

    def weights(stage, layout, part=None):
        """[members, P]: the weights in a stage's file, or in a part of it."""
        tensors = load_tensors(folder / f"{stage}.pt")
        with reading(folder / f"{stage}.pt"):
            flat = layout.flatten(tensors[part] if part else tensors)
            if len(flat) != len(members) or not flat.isfinite().all():
                raise ValueError("NaN or infinite weights, or not of every seed")
            return flat

    if method == "random":
        policies = [partial(data.random_policy, a_dim) for _ in members]
    elif method == "idql":
        both = zip(weights("behavior", noise_model), weights("critic", q, "q_target"))
        policies = [
            IDQL(noise_model.bind(psi), q.bind(phi), a_dim) for psi, phi in both
        ]
    else:
        policies = [
            numpy_policy(policy.tensors(theta)) for theta in weights(method, policy)
        ]
    return members, [(seed, policy) for (_, seed), policy in zip(members, policies)]


def evaluate(folder, method, episodes, workers):
    """Scores a trained run's policies anew; writes evaluation-METHOD.json."""
    config = read_config(folder)
    members, policies = load_policies(folder, config, method)
    episodes = episodes or config["settings"]["episodes"]
    with data.Workers(workers) as workers:
        returns, broken = data.returns_of(
            workers.roll_out(config["task"], policies, episodes)
        )
    rows = score_rows(config["task"], method, None, members, returns)
    try:
        print_scores(folder, config, rows)
    finally:
        save_json(folder / f"evaluation-{method}.json", config | {"scores": rows})
    if broken:
        print(f"MuJoCo gave up on {broken} episodes, which count until there")


# ---------------------------------------------------------------------------------------------- command line


class Screen:
    """Standard output or error that costs no training: by a character, a full disk or a reader who left."""

    def __init__(self, stream, number):
        self.stream = stream
        if stream is None:  # it was closed from the start, but workers want one
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)
            self.stream = open(number, "w", closefd=False)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        if not self.isatty():
            text = text.replace("\r", "\n")  # a progress bar's
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def isatty(self):
        return hasattr(self.stream, "isatty") and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def program(name, command):
    """command(); 0, 2 after a line for what its user can mend, 130 after Ctrl-C. The process is as before."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    screens = Screen(sys.stdout, 1), Screen(sys.stderr, 2)
    with contextlib.redirect_stdout(screens[0]), contextlib.redirect_stderr(screens[1]):
        try:
            command()
            return 0
        except KeyboardInterrupt:
            return 130
        except (UserError, OSError, BrokenExecutor) as error:
            reason = error
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not full and not re.search(
                "DefaultCPUAllocator|Storage size", str(error)
            ):
                raise
            reason = "memory is full; smaller settings, or fewer --seeds at a time, each set with its own --out"
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])
        print(f"{name}: {' '.join(str(reason).split())}", file=sys.stderr)
        return 2


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def folder(text):
    return Path(text).expanduser()  # a shell does not, within quotes or after =


def beta(text):
    return text if text == "sweep" else float(text)


def device(text):
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(
            "cpu or cuda; which GPU: CUDA_VISIBLE_DEVICES=1 before the command"
        )
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            "PyTorch sees no GPU; take --device cpu or torch's CUDA build"
        )
    return text


def parse(arguments):
    """The command line; its settings are made from the dataclass, so that --help and the code are one."""
    parser = Parser(
        prog="run.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    training = commands.add_parser(
        "train", help="train and score a task", allow_abbrev=False
    )
    training.add_argument("task", help=f"a task of Table 1, or {data.DEMO}")
    training.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="trials"
    )
    training.add_argument(
        "--out", type=folder, default=Path("runs"), help="results go to OUT/TASK"
    )
    training.add_argument(
        "--device", type=device, help="cpu or cuda; default: cuda where there is one"
    )
    training.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="default: where it pays",
    )
    training.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=5,
        help="the most that a crash loses",
    )
    training.add_argument(
        "--reuse",
        type=folder,
        metavar="FOLDER",
        help="take critic and behavior model from this run",
    )
    training.add_argument(
        "--any-data", action="store_true", help="accept a data file that is not D4RL's"
    )
    for field in dataclasses.fields(Settings):
        how = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how |= {"nargs": "*", "type": str if how["choices"] else beta}
        default = "by task" if field.default is None else field.default
        how["help"] = f"{field.metadata['help']}; default: {default}"
        training.add_argument(
            "--" + field.name.replace("_", "-"), default=field.default, **how
        )
    scoring = commands.add_parser(
        "evaluate", help="score a trained run anew", allow_abbrev=False
    )
    scoring.add_argument("folder", type=folder, help="a run's folder, OUT/TASK")
    scoring.add_argument(
        "--method", default="srpo", choices=("srpo", "idql", "iql", "bc", "random")
    )
    scoring.add_argument(
        "--episodes", type=positive, help="episodes of each seed; default: the run's"
    )
    for command in (training, scoring):
        command.add_argument(
            "--workers",
            type=positive,
            help="evaluation processes; default: one per core",
        )
    return vars(parser.parse_args(arguments))


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""

    def command():
        given = parse(arguments)
        if given.pop("command") == "evaluate":
            return evaluate(**given)
        task, seeds = data.check_task(given.pop("task")), given["seeds"]
        chosen = {
            field.name: given.pop(field.name) for field in dataclasses.fields(Settings)
        }
        try:
            settings = Settings(**chosen).resolve(task)
        except ValueError as error:
            raise UserError(error) from None
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise UserError(
                "--seeds must be different whole numbers from 0 to 2147483647"
            )
        train(task, settings, **given)

    return program("run", command)


if __name__ == "__main__":
    for stopping in data.SIGNALS:  # before training, too: half a download is removed
        signal.signal(
            stopping,
            lambda number, frame: sys.exit(130 if number == signal.SIGINT else 143),
        )
    sys.exit(main())
