"""D4RL's environments without MuJoCo 2.1.0: the name `mujoco_py`, on today's `mujoco`.

gym 0.23.1 and d4rl 1.1 import mujoco_py, which needs the MuJoCo 2.1.0 binaries and a
compiler. `install()`, called before they are imported, puts this module under that
name, so that both run unmodified on pip's wheels. Here is only what D4RL's locomotion,
AntMaze and maze2d use of mujoco-py; a reader of the paper may skip it.

MuJoCo 3.2.6 steps a model as 2.1.0 did, but makes another model from the same XML:

1. Hopper and walker2d are in global coordinates, which 2.3.4 removed, and have
   positions like "0.13/2 0 0.1", which 2.2.1 began to refuse and 2.1.0 read up to the
   slash, as 0.13 0 0.
2. Until 2.1.1 a capsule weighed as much as a cylinder of its radius, half a radius
   longer at either end.
3. Until 3.0.0 the inverse weight of a body that only slides was averaged over three
   axes, slides or not.
4. Until 3.2.0 mj_forward normalized the quaternions in qpos, and observations after a
   reset show that.
"""

import collections
import os
import re
import sys
import xml.etree.ElementTree as ET
from unittest import mock

import numpy as np

mujoco = None  # imported by install()

# The one measured with these corrections against MuJoCo 2.1.0. 2.3.3 to 2.3.7 lose
# contacts of capsules; from 3.2.7 on a capsule deep in a wall is pushed out otherwise.
VERSION = "3.2.6"


class MujocoException(Exception):
    """A warning of MuJoCo (an unstable simulation), or something that is not here."""


def install():
    """Make `import mujoco_py` find this module, before gym and d4rl are imported.

    ImportError where `mujoco` is missing or of another version than VERSION. A second
    call changes nothing, nor does one where mujoco-py itself has been imported.
    """
    global mujoco
    if "mujoco_py" in sys.modules:
        return
    try:
        # physics needs no GL, and a MUJOCO_GL that this machine lacks would fail here
        with mock.patch.dict(os.environ, MUJOCO_GL="disable"):
            import mujoco
    except ImportError as error:
        cure = f"pip install mujoco=={VERSION}"
        raise ImportError(
            f"D4RL's environments need MuJoCo: {cure} ({error})"
        ) from None
    if (found := mujoco.__version__) != VERSION:
        cure = f"pip install mujoco=={VERSION}"
        raise ImportError(f"mujoco {found} may not step as 2.1.0 did: {cure}")
    # without this MuJoCo writes its warnings to a file and goes on
    mujoco.set_mju_user_warning(_warnings.append)
    sys.modules["mujoco_py"] = sys.modules[__name__]


def import_d4rl():
    """d4rl with its locomotion, AntMaze and maze2d registered, without its messages."""
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    install()
    import d4rl
    import d4rl.gym_mujoco  # d4rl's own import stops before these two
    import d4rl.pointmaze
    import gym

    gym.logger.set_level(gym.logger.ERROR)
    # AntMaze prints its "Target Goal" at every reset
    d4rl.locomotion.maze_env.print = lambda *args: None
    return d4rl


def get_version():
    return "2.1.2.14"  # the mujoco-py that d4rl 1.1 was written for


# The model that MuJoCo 2.1.0 would have made


def load_model_from_path(path):
    """The model of an XML file, with corrections 1 to 3."""
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
    averaged = model.body_dofnum[slides] / model.body_mass[slides] / 3
    model.body_invweight0[slides, 0] = averaged
    return PyMjModel(model)


def _make_local(parent, origin):
    """Global to local coordinates, below `parent`, whose own position is `origin`."""
    for body in parent.findall("body"):
        position = _floats(body.get("pos"))
        body.set("pos", _text(position - origin))
        for joint in body.findall("joint"):
            joint.set("pos", _text(_floats(joint.get("pos")) - position))
        for geom in body.findall("geom"):
            ends = _floats(geom.get("fromto")) - np.tile(position, 2)
            geom.set("fromto", _text(ends))
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
    """What gym and d4rl read of a model."""

    def __init__(self, model):
        self._model = model
        self.nq, self.nv, self.opt = model.nq, model.nv, model.opt
        self.actuator_ctrlrange = model.actuator_ctrlrange
        self._camera_name2id = {}  # gym's render looks here before it wants a viewer

    def site_name2id(self, name):
        return self._model.site(name).id


class PyMjData:
    """What gym and d4rl read and set of a simulation's state."""

    def __init__(self, data):
        self._data = data
        # Taken once: each look at an MjData's attribute makes a new array, and these
        # are read at every step.
        self.qpos, self.qvel, self.ctrl = data.qpos, data.qvel, data.ctrl
        self.cfrc_ext, self.site_xpos = data.cfrc_ext, data.site_xpos

    def get_body_xpos(self, name):
        return self._data.body(name).xpos


class MjSim:
    """A simulation, whose warnings are exceptions."""

    def __init__(self, model):
        self.model, self._model = model, model._model
        self._data = mujoco.MjData(self._model)
        self.data = PyMjData(self._data)

    def reset(self):
        mujoco.mj_resetData(self._model, self._data)

    def forward(self):
        mujoco.mj_normalizeQuat(self._model, self.data.qpos)  # correction 4
        mujoco.mj_forward(self._model, self._data)
        self._raise_warnings()

    def step(self):
        mujoco.mj_step(self._model, self._data)
        self._raise_warnings()

    def get_state(self):
        qpos, qvel = self.data.qpos.copy(), self.data.qvel.copy()
        return MjSimState(self._data.time, qpos, qvel, None, {})

    def set_state(self, state):
        self._data.time = state.time
        self.data.qpos[:], self.data.qvel[:] = state.qpos, state.qvel

    def _raise_warnings(self):
        if _warnings:
            text = _warnings[0]
            _warnings.clear()
            raise MujocoException(f"Got MuJoCo Warning: {text}")


def _no_viewer(*args, **kwargs):
    raise MujocoException("no rendering: here is the physics only")


MjViewer = MjRenderContextOffscreen = _no_viewer
