"""
Settings: the defaults in a script, changed by a config file, changed by the command line.

    settings, name = configure(dict(steps=100, learning_rate=3e-4), sys.argv[1:])

    python train.py config/train_tiny.py --seed=2 --stages.stage2.steps=100

A config file holds nothing but assignments, such as `learning_rate = 10 * 3e-4`. A value may use names assigned above;
names that start with `_` are not settings and exist only for that. `base = "train_tiny.py"` applies another file first,
from the same folder or from config/. A dict or list replaces the whole default; `--stages.stage2.steps=100` changes one
value in a dict. Every value must have the type of its default, except that a dict may stand for a list: data folders
with their weights. Every mistake ends the script with one line that says where it is and what to write instead.
"""
import ast
import copy
import difflib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # on the command line


def configure(defaults, argv, complete=lambda settings: None, described_in=()):
    """Return (settings, name): the defaults as changed by argv, and the config file's stem or "default".

    defaults: {name: bool, int, float, str, list or dict}; settings is a new dict in the same order.
    argv: at most one config file, in the current folder or beside this module, and --key=value, which win over it.
    complete(settings): fills in what nested dicts leave out; called after the file and again after the overrides.
    described_in: files other than the running script that have comments on settings, for --help.
    Raises SystemExit: with code 0 after --help, with a one-line message for anything wrong in argv or the file.
    """
    if "-h" in argv or "--help" in argv:
        print_help(defaults, described_in)
        sys.exit(0)
    settings, name = copy.deepcopy(defaults), "default"
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        raise SystemExit(f"command line: {files[1]} is a second config file; give one, and the rest as --key=value")
    if files:
        apply_file(settings, defaults, find_config(files[0], [Path(), ROOT], f"command line: {files[0]}"))
        name = Path(files[0]).stem
    complete(settings)
    for override in [arg for arg in argv if arg.startswith("-")]:
        apply_override(settings, defaults, override)
    complete(settings)
    return settings, name


def print_help(defaults, described_in=()):
    """Print how the running script is called, and every setting with its default and the comment beside it.

    The first is the script's docstring. The comments are those of lines `key = value  # comment` in the script and in
    the files described_in; the script's own win.
    """
    script, comments = Path(sys.argv[0]), {}
    for file in [*described_in, script]:
        comments |= dict(re.findall(r"^ *(\w+) ?= ?.*?  # (.*)$", Path(file).read_text(encoding="utf-8"), re.MULTILINE))
    print(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.name, "\n\nSettings:")
    for key, value in defaults.items():
        print(f"  --{key}={value}".ljust(39), comments.get(key, ""))


def find_config(file, folders, where):
    """Return the path of file in the first folder that has it. Raises SystemExit, starting with where, if none has."""
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    known = {}
    for place in [(folder / file).parent for folder in folders] + [ROOT / "config"]:
        known |= {path.name: os.path.relpath(path) for path in place.glob("*.py")}
    hint = f"did you mean {known[nearest(Path(file).name, known)]}?" if known else "give the path of an existing file"
    raise SystemExit(f"{where}: no such config file; {hint}")


def nearest(name, names):
    """Return the one of names that is spelled most like name."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def apply_file(settings, defaults, path, derived=()):
    """Assign what a config file and, before it, its base say. derived: the files of which this one is a base."""
    if path.resolve() in derived:
        raise SystemExit(f"{path}: starts from itself; remove a base = line in {' or '.join(p.name for p in derived)}")
    values, places = read_file(path)
    if "base" in values:
        base = find_config(str(values.pop("base")), [path.parent, ROOT / "config"], places["base"])
        apply_file(settings, defaults, base, (*derived, path.resolve()))
    for key, value in values.items():
        if not key.startswith("_"):
            check_key(key, settings, places[key])
            settings[key] = fit(value, defaults[key], places[key])


def read_file(path):
    """Return ({name: value}, {name: "path:line: statement"}) of a file's assignments. Raises SystemExit."""
    try:
        statements = ast.parse(path.read_bytes(), path).body
    except (SyntaxError, ValueError) as error:
        raise SystemExit(f"{path}: is not Python ({error}); write lines of name = value") from None
    values, places = {}, {}
    for statement in statements:
        place = f"{path}:{statement.lineno}: {ast.unparse(statement).splitlines()[0]}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                try:
                    values[name], places[name] = evaluate(expression, values), place
                except Exception as error:  # an expression can fail in any way
                    raise SystemExit(f"{place}: {error}; write numbers, strings, lists, dicts, arithmetic") from None
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case _:
                raise SystemExit(f"{place}: does not belong in a config file; write lines of name = value")
    return values, places


def apply_override(settings, defaults, arg):
    """Assign what one --key=value or --key.key=value says. Raises SystemExit for an unknown key or a wrong type."""
    if not arg.startswith("--") or "=" not in arg:
        raise SystemExit(f"command line: {arg} has no value; write --{arg.lstrip('-') or 'key'}=value")
    dotted, text = arg[2:].split("=", 1)
    *outer, key = dotted.split(".")
    target, prefix = settings, ""
    for name in outer:
        check_key(name, target, "command line", prefix)
        if not isinstance(target[name], dict):
            raise SystemExit(f"command line: {arg}: {prefix}{name} is {target[name]!r}, which has nothing inside; "
                             f"write --{prefix}{name}=value")
        target[name] = dict(target[name])  # a config file may have put the same dict under two keys
        target, prefix = target[name], f"{prefix}{name}."
    check_key(key, target, "command line", prefix)
    default = target[key] if outer else defaults[key]
    target[key] = fit(from_text(text, default), default, f"command line: {arg}")


def check_key(key, settings, where, prefix=""):
    """Raise SystemExit if settings has no such key. prefix: the dotted keys that lead to settings."""
    if key not in settings:
        hint = f"did you mean {prefix}{nearest(key, settings)}?" if settings else f"{prefix[:-1]} is empty"
        raise SystemExit(f"{where}: no setting {prefix}{key}; {hint}")


def from_text(text, default):
    """Return the value that a text from the command line stands for, or the text itself if it cannot be read."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return BOOLS.get(text.lower(), text)
    try:
        return evaluate(ast.parse(text.strip(), mode="eval").body, {})
    except Exception:
        return text  # fit() will refuse its type


def evaluate(expression, names):
    """Return the value of a parsed expression, which may use names and call dict(...). Raises any Exception."""
    for node in ast.walk(expression):
        match node:
            case ast.Call(func=ast.Name(id="dict")):
                pass
            case ast.Call() | ast.Attribute() | ast.Lambda() | ast.comprehension():  # could lead to any code
                raise ValueError(f"{ast.unparse(node).strip()!r} is not allowed")
    code = compile(ast.Expression(expression), "<setting>", "eval")
    return eval(code, names | {"__builtins__": {}, "dict": dict})


def fit(value, default, where):
    """Return value as the type of default. Raises SystemExit, starting with where, if that would change its meaning.

    1e6 is accepted as an int, 1 as a float and a tuple as a list; 1.5 is not an int and 1 is not a bool.
    """
    kind, is_number = type(default), type(value) in (int, float)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == value // 1:
        return int(value)
    if kind is list and isinstance(value, tuple):
        return list(value)
    if type(value) is kind or (kind is list and isinstance(value, dict)):  # data folders may come with weights
        return value
    wanted = "true or false" if kind is bool else f"a value of type {kind.__name__}"
    raise SystemExit(f"{where} is {value!r}, of type {type(value).__name__}; give {wanted}, like {default!r}")
