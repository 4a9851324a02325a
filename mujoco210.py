"""D4RL's environments without MuJoCo 2.1.0: the name `mujoco_py`, on the official `mujoco` bindings.

gym 0.23.1 and d4rl 1.1 import mujoco_py, which needs the MuJoCo 2.1.0 binaries and a compiler. `install()`,
called before they are imported, puts this module under that name, so that both run unmodified on pip's
wheels. Here is only what the sixteen tasks use of mujoco-py.

MuJoCo 3.2.6 steps a model as 2.1.0 did, but makes another model from the same XML. Put back:

1. Hopper and walker2d are in global coordinates, which 2.3.4 removed, and have positions like "0.13/2 0 0.1",
   which 2.2.1 began to refuse and 2.1.0 read up to the slash, as 0.13 0 0.
2. Until 2.1.1 a capsule weighed as much as a cylinder of its radius, half a radius longer at either end.
3. Until 3.0.0 the inverse weight of a body that only slides was averaged over three axes, slides or not.
4. Until 3.2.0 mj_forward normalized the quaternions in qpos, and observations after a reset show that.
"""

import collections
import contextlib
import importlib.util
import io
import os
import pathlib
import re
import sys
import xml.etree.ElementTree as ET
from unittest import mock

import numpy as np

mujoco = None  # imported by install(), where mujoco-py itself can't be

# The one measured with these corrections against MuJoCo 2.1.0. 2.3.3 to 2.3.7 lose contacts of capsules; from
# 3.2.7 on a capsule deep in a wall is pushed out otherwise.
VERSION = "3.2.6"


class MujocoException(Exception):
    """A warning of MuJoCo (an unstable simulation), as in mujoco-py, or something that is not here."""


def install():
    """Make `import mujoco_py` work, before gym and d4rl are imported; the module that now has the name.

    Where mujoco-py is installed and built for MuJoCo 2.1.0, that is mujoco-py itself, else this one. Raises
    ImportError where `mujoco` is missing or another version than VERSION. A second call changes nothing.
    """
    if "mujoco_py" not in sys.modules and not _import_mujoco_py():
        global mujoco
        try:
            with mock.patch.dict(
                os.environ, MUJOCO_GL="disable"
            ):  # physics needs none; a wrong one fails
                import mujoco
        except ImportError as error:
            cure = f"pip install mujoco=={VERSION}"
            raise ImportError(
                f"D4RL's environments need MuJoCo: {cure} ({error})"
            ) from None
        if (found := mujoco.__version__) != VERSION:
            raise ImportError(
                f"mujoco {found} may not step as 2.1.0 did: pip install mujoco=={VERSION}"
            )
        mujoco.set_mju_user_warning(
            _warnings.append
        )  # without it MuJoCo writes them to a file and goes on
        sys.modules["mujoco_py"] = sys.modules[__name__]
    return sys.modules["mujoco_py"]


def _import_mujoco_py():
    """Whether mujoco-py itself imports, without its habit of starting a compiler on import.

    It builds itself where its extension is missing or fails to load: the first is looked for, the second is
    prevented by withholding `cythonize`, with which every build begins.
    """
    try:
        package = importlib.util.find_spec("mujoco_py").submodule_search_locations[0]
        binaries = os.environ.get("MUJOCO_PY_MUJOCO_PATH") or os.path.expanduser(
            "~/.mujoco/mujoco210"
        )
        extension = "cymj_*_{}{}_*.so".format(
            *sys.version_info
        )  # its wheel brings some for other systems
        if not os.path.isdir(binaries) or not any(
            pathlib.Path(package, "generated").glob(extension)
        ):
            return False
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            with mock.patch("Cython.Build.cythonize", side_effect=ImportError):
                importlib.import_module("mujoco_py")
        return True
    except Exception:  # whatever is wrong with it, there is another
        return False


def get_version():
    return "2.1.2.14"  # the mujoco-py that d4rl 1.1 was written for


# The model that MuJoCo 2.1.0 would have made


def load_model_from_path(path):
    with open(path) as file:
        root = ET.fromstring(re.sub(r'"([\d.]+)/2 0 0\.1"', r'"\1 0 0"', file.read()))
    compiler = root.find("compiler[@coordinate='global']")
    if compiler is not None:
        del compiler.attrib["coordinate"]
        _make_local(root.find("worldbody"), np.zeros(3))
    model = mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))
    _capsules_to_cylinders(root)
    twin = mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(twin, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from the masses
    slides = (model.body_simple == 2) & (model.body_dofnum > 0)
    model.body_invweight0[slides, 0] = (
        model.body_dofnum[slides] / model.body_mass[slides] / 3
    )
    return PyMjModel(model)


def _make_local(parent, origin):
    for body in parent.findall("body"):
        position = _floats(body.get("pos"))
        body.set("pos", _text(position - origin))
        for joint in body.findall("joint"):
            joint.set("pos", _text(_floats(joint.get("pos")) - position))
        for geom in body.findall("geom"):
            geom.set(
                "fromto", _text(_floats(geom.get("fromto")) - np.tile(position, 2))
            )
        _make_local(body, position)


def _capsules_to_cylinders(root):
    for geom in root.iterfind(".//geom[@type='capsule']"):
        geom.set("type", "cylinder")
        size = _floats(geom.get("size"))
        if geom.get("fromto"):
            start, end = _floats(geom.get("fromto")).reshape(2, 3)
            longer = (end - start) / np.linalg.norm(end - start) * size[0] / 2
            geom.set("fromto", _text(np.concatenate([start - longer, end + longer])))
        else:
            geom.set("size", _text(size + [0, size[0] / 2]))


def _floats(text):
    return np.array(text.split(), float)


def _text(values):
    return " ".join(repr(float(v)) for v in values)  # to the last bit


# mujoco-py's interface

_warnings = []
MjSimState = collections.namedtuple("MjSimState", "time qpos qvel act udd_state")


class PyMjModel:
    def __init__(self, model):
        self._model = model
        self.nq, self.nv, self.opt = model.nq, model.nv, model.opt
        self.actuator_ctrlrange = model.actuator_ctrlrange
        self._camera_name2id = {}  # gym's render looks here before it asks for a viewer

    def site_name2id(self, name):
        return self._model.site(name).id


class PyMjData:
    def __init__(self, data):
        self._data = data
        # Taken once: each look at an MjData's attribute makes a new array, and these are read at every step.
        self.qpos, self.qvel, self.ctrl = data.qpos, data.qvel, data.ctrl
        self.cfrc_ext, self.site_xpos = data.cfrc_ext, data.site_xpos

    def get_body_xpos(self, name):
        return self._data.body(name).xpos


class MjSim:
    def __init__(self, model):
        self.model, self._model, self._data = (
            model,
            model._model,
            mujoco.MjData(model._model),
        )
        self.data = PyMjData(self._data)

    def reset(self):
        mujoco.mj_resetData(self._model, self._data)

    def forward(self):
        mujoco.mj_normalizeQuat(self._model, self.data.qpos)
        mujoco.mj_forward(self._model, self._data)
        self._raise_warnings()

    def step(self):
        mujoco.mj_step(self._model, self._data)
        self._raise_warnings()

    def get_state(self):
        return MjSimState(
            self._data.time, self.data.qpos.copy(), self.data.qvel.copy(), None, {}
        )

    def set_state(self, state):
        self._data.time, self.data.qpos[:], self.data.qvel[:] = (
            state.time,
            state.qpos,
            state.qvel,
        )

    def _raise_warnings(self):
        if _warnings:
            text = _warnings[0]
            _warnings.clear()
            raise MujocoException(f"Got MuJoCo Warning: {text}")


def _no_viewer(*args, **kwargs):
    raise MujocoException(
        "no rendering: mujoco210 has the physics only, mujoco-py itself has pictures"
    )


MjViewer = MjRenderContextOffscreen = _no_viewer
