"""configurator.py: defaults, config files, the command line, and one-line messages for every mistake."""
import subprocess
import sys

import pytest

import configurator
from configurator import ROOT, configure, nearest

STAGES = dict(stage1=dict(steps=10, learning_rate=1e-3, train="new"), stage2=dict(steps=20, learning_rate=1e-3))
DEFAULTS = dict(steps=100, learning_rate=3e-4, compile=False, out_dir="", text=[], stages=STAGES)


def fails(argv, *parts, defaults=DEFAULTS):
    """Check that configure() ends with one line that holds all the parts."""
    with pytest.raises(SystemExit) as error:
        configure(defaults, [str(arg) for arg in argv])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_stay_untouched():
    config, name = configure(DEFAULTS, [])
    assert (config, name, list(config)) == (DEFAULTS, "default", list(DEFAULTS))
    config["text"].append("x")
    configure(DEFAULTS, ["--stages.stage1.steps=0"])
    assert DEFAULTS["stages"]["stage1"]["steps"] == 10 and DEFAULTS["text"] == []


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "fast.v2.py", '"""A docstring."""\nlearning_rate = 10 * 3e-4\nsteps = 9\ntext = dict(a=1)\n')
    config, name = configure(DEFAULTS, ["--steps=7", str(path), "--text=['b']"])
    assert name == "fast.v2" and list(config) == list(DEFAULTS)
    assert config == DEFAULTS | dict(learning_rate=10 * 3e-4, steps=7, text=["b"])


def test_complete_is_called_after_the_file_and_after_the_overrides(tmp_path):
    def complete(settings):
        settings["stages"]["stage1"].setdefault("steps", 1)
    path = write(tmp_path, "a.py", "stages = dict(stage1=dict())")
    for argv, steps in (([str(path), "--stages.stage1.steps=5"], 5), (["--stages=dict(stage1=dict())"], 1)):
        assert configure(DEFAULTS, argv, complete)[0]["stages"] == dict(stage1=dict(steps=steps))


def test_values_in_a_file(tmp_path):
    """Arithmetic, names assigned above, nested values; and an override changes one of two stages that share a dict."""
    path = write(tmp_path, "a.py", """
_tokens = 2**20
steps = _tokens // (12 * 256)
learning_rate = steps / 2 - -1
compile = True
out_dir = "out/" + "a"
text = {"data/a": 0.7, "data/b": 0.3}
_stage = dict(steps=steps, mixture={"text": 1, "speech": [1, (2, 3)]})
stages = dict(stage1=_stage, stage2=_stage)
""")
    config, _ = configure(DEFAULTS, [str(path), "--stages.stage1.mixture.text=5", "--stages.stage1.steps=6"])
    assert config == dict(
        steps=341, learning_rate=171.5, compile=True, out_dir="out/a", text={"data/a": 0.7, "data/b": 0.3},
        stages=dict(stage1=dict(steps=6, mixture=dict(text=5, speech=[1, (2, 3)])),
                    stage2=dict(steps=341, mixture=dict(text=1, speech=[1, (2, 3)]))))


@pytest.mark.parametrize("text, reason", [
    ("import os", "does not belong"), ("def f():\n  pass", "does not belong"), ("steps += 1", "does not belong"),
    ("a = steps = 1", "does not belong"), ("for steps in [1]:\n  pass", "does not belong"), ("1", "does not belong"),
    ("steps = open(1)", "'open' is not defined"), ("steps = __import__('os')", "'__import__' is not defined"),
    ("steps = learning_rate", "'learning_rate' is not defined"), ("steps = 1 / 0", "division by zero"),
    ("steps = 'a' - 1", "unsupported operand")])
def test_refused_statements(tmp_path, text, reason):
    path = write(tmp_path, "a.py", "\n" + text)
    fails([path], f"{path}:2: {text.splitlines()[0]}", reason, "write ")


def test_a_base_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, "ROOT", tmp_path)
    write(tmp_path, "config/grand.py", "steps = 1\nlearning_rate = 1\nout_dir = 'g'")  # found in ROOT/config
    write(tmp_path, "config/base.py", "base = 'nothing.py'")  # not used: mine.py's own folder has a base.py
    write(tmp_path, "base.py", "steps = 2\nbase = 'grand.py'\nlearning_rate = 2\n_a = 1")
    path = write(tmp_path, "mine.py", "steps = 3\nbase = 'base.py'")
    config, name = configure(DEFAULTS, [str(path)])
    assert (config["steps"], config["learning_rate"], config["out_dir"], name) == (3, 2.0, "g", "mine")
    path = write(tmp_path, "far.py", "base = 'base.py'\nsteps = _a")
    fails([path], f"{path}:2", "'_a' is not defined")
    path = write(tmp_path, "lost.py", "base = 'mien.py'")
    fails([path], f"{path}:1", "mien.py", "no such config file; did you mean", "mine.py?")
    write(tmp_path, "grand.py", "base = 'mine.py'")
    fails([tmp_path / "mine.py"], "mine.py: starts from itself")


def test_a_file_is_found_in_the_current_folder_or_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(["config/train_tny.py"], "config/train_tny.py: no such config file", "train_tiny.py?")
    fails(["nowhere/train_tny.py"], "config/train_tiny.py?")
    fails(["config/train_tiny.py"], f"{ROOT / 'config' / 'train_tiny.py'}:", "no setting", defaults=dict(other=1))
    write(tmp_path, "config/train_tiny.py", "steps = 5")
    assert configure(DEFAULTS, ["config/train_tiny.py"])[0]["steps"] == 5


@pytest.mark.parametrize("arg, value", [
    ("learning_rate=1", 1.0), ("learning_rate=3*1e-4", 3 * 1e-4), ("steps=2**20", 2**20), ("steps= 1e6", 10**6),
    ("compile=true", True), ("compile=Yes", True), ("compile=1", True), ("resume=false", False), ("resume=No", False),
    ("resume=0", False), ("out_dir=123", "123"), ("out_dir=a=b", "a=b"), ("out_dir=", ""), ("out_dir=--x y", "--x y"),
    ("text=['a', 'b']", ["a", "b"]), ("text=('a',)", ["a"]), ("text={'a': 0.5}", {"a": 0.5}),
    ("stages=dict(x=dict(steps=1))", dict(x=dict(steps=1)))])
def test_overrides_take_the_type_of_the_default(arg, value):
    defaults = DEFAULTS | dict(resume=True, out_dir="out")
    config, _ = configure(defaults, [f"--{arg}"])
    key = arg.split("=")[0]
    assert config == defaults | {key: value} and type(config[key]) is type(value)


def test_dotted_keys_change_one_value():
    argv = ["--stages.stage1.steps=1e1", "--stages.stage1.train=all", "--stages.stage2.learning_rate=1"]
    assert configure(DEFAULTS, argv)[0]["stages"] == dict(
        stage1=dict(steps=10, learning_rate=1e-3, train="all"), stage2=dict(steps=20, learning_rate=1.0))


@pytest.mark.parametrize("argv, parts", [
    ("--stages.stage1.stps=1", ["no setting stages.stage1.stps; did you mean stages.stage1.steps?"]),
    ("--stages.stge2.steps=1", ["no setting stages.stge2; did you mean stages.stage2?"]),
    ("--stages.stage1.steps.x=1", ["stages.stage1.steps is 10", "write --stages.stage1.steps=value"]),
    ("--stages.stage1.steps=x", ["--stages.stage1.steps=x is 'x', of type str", "int, like 10"]),
    ("--text.a=1", ["text is []"]), ("--compile", ["--compile has no value; write --compile=value"]),
    ("-x", ["write --x=value"]), ("--steps no_file", ["no_file: no such config file"]),
    ("a.py b.py", ["second config file"]), ("--steps=9e", ["--steps=9e is '9e'"]), ("--steps=steps", ["is 'steps'"]),
    ("--text=len", ["is 'len', of type str; give a value of type list"]),
    ("--learning_rte=1", ["no setting learning_rte; did you mean learning_rate?"])])
def test_wrong_command_lines(argv, parts):
    fails(argv.split(), "command line: ", *parts)


def test_mistakes_in_a_file_name_the_line(tmp_path):
    path = write(tmp_path, "a.py", "steps = 1\n\nlerning_rate = 1\n")
    fails([path], f"{path}:3: lerning_rate = 1: no setting lerning_rate; did you mean learning_rate?")
    fails([write(tmp_path, "a.py", "\nsteps = = 3")], "a.py", "line 2", "is not Python")
    fails([write(tmp_path, "a.py", "out_dir = 3")], "out_dir = 3 is 3, of type int; give a value of type str")
    assert nearest("xyz", ["steps"]) == "steps"


@pytest.mark.parametrize("key, text", [
    ("steps", "1.5"), ("steps", "'1'"), ("steps", "True"), ("steps", "(-1)**0.5"), ("steps", "1e999"),
    ("steps", "None"), ("learning_rate", "'a'"), ("learning_rate", "True"), ("compile", "'x'"), ("compile", "2"),
    ("text", "'a'"), ("stages", "[1]")])
def test_wrong_types_name_the_place_and_the_wanted_type(tmp_path, key, text):
    path = write(tmp_path, "a.py", f"{key} = {text}")
    wanted = "give true or false" if key == "compile" else f"give a value of type {type(DEFAULTS[key]).__name__}"
    fails([path], f"{path}:1: {key} = ", wanted, repr(DEFAULTS[key]))
    fails([f"--{key}={text}"], f"command line: --{key}={text} is ", wanted)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_setting_with_its_comment(tmp_path, flag):
    script = write(tmp_path, "script.py", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
steps = 100          # of the optimizer
text = ["a#b"]
configure(dict(steps=steps, text=text), sys.argv[1:])
raise SystemExit(3)
""")
    done = subprocess.run([sys.executable, str(script), flag], capture_output=True, text=True)
    assert done.returncode == 0 and "--text=['a#b']" in done.stdout
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if "--steps" in line] == ["of the optimizer"]
