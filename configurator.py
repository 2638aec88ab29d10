"""
Settings: the defaults in a script, changed first by a config file and then by the command line.

    settings, name = configure(dict(steps=100, learning_rate=3e-4), sys.argv[1:])

A config file contains only assignments like `learning_rate = 10 * 3e-4`. A value may use names assigned above it. Names
that start with `_` are not settings. `base = "train_tiny.py"` applies another file first, from the same folder, from
config/, or by its path. A dict or list replaces the whole default. `--stages.stage2.steps=100` changes one value in a
dict. Every value must have the type of its default, except that a dict {folder: weight} may replace a list of folders.
A mistake ends the script with one line that says where the mistake is and what to write instead.
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

    defaults       {name: bool, int, float, str, list or dict}; settings is a new dict in the same order
    argv           at most one config file, in the current folder or in the repository, and --key=value
    complete       function of the settings that fills in nested dicts; called after the file and after the overrides
    described_in   files, in addition to the running script, whose comments describe settings for --help
    SystemExit with code 0 after --help, and with a one-line message for a mistake in argv or the file.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows a question mark
            stream.reconfigure(errors="replace")
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
    """Print the running script's docstring, and every setting with its default and the comment on its line.

    Comments are read from lines `key = value  # comment` of the files described_in and of the script. For a setting in
    both, the comment in the script is used.
    """
    script, comments = Path(sys.argv[0]), {}
    for file in [*described_in, script]:
        comments |= dict(re.findall(r"^ *(\w+) ?= ?.*?  # (.*)$", Path(file).read_text(encoding="utf-8"), re.MULTILINE))
    print(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.name, "\n\nSettings:")
    for key, value in defaults.items():
        print(f"  --{key}={value}".ljust(39), comments.get(key, ""))


# Below, `place` tells a message where a setting was given: "command line: ..." or "path:line: statement".

def find_config(file, folders, place):
    """Return the path of a config file in the first of the folders that has it. SystemExit if none has."""
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    known = {}
    for folder in [(folder / file).parent for folder in folders] + [ROOT / "config"]:
        known |= {path.name: os.path.relpath(path) for path in folder.glob("*.py")}
    hint = f"did you mean {known[nearest(Path(file).name, known)]}?" if known else "give the path of an existing file"
    raise SystemExit(f"{place}: no such config file; {hint}")


def nearest(name, names):
    """Return the entry of names whose spelling is closest to name."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def apply_file(settings, defaults, path, derived=()):
    """Apply a config file, after its base. derived: the files that are based on this one, directly or indirectly."""
    if path.resolve() in derived:
        raise SystemExit(f"{path}: starts from itself; remove a base = line in {' or '.join(p.name for p in derived)}")
    values, places = read_file(path)
    if "base" in values:
        folders = [path.parent, ROOT / "config", ROOT, Path()]
        base = find_config(str(values.pop("base")), folders, places["base"])
        apply_file(settings, defaults, base, (*derived, path.resolve()))
    for key, value in values.items():
        if not key.startswith("_"):
            check_key(key, settings, places[key])
            settings[key] = fit(value, defaults[key], places[key])


def read_file(path):
    """Return ({name: value}, {name: place}) of the assignments in a file. SystemExit for anything else in it."""
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
                    values[name], places[name] = evaluate(ast.unparse(expression), values), place
                except Exception as error:  # an expression can fail in any way
                    raise SystemExit(f"{place}: {error}; write numbers, strings, lists, dicts, arithmetic") from None
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case _:
                raise SystemExit(f"{place}: does not belong in a config file; write lines of name = value")
    return values, places


def apply_override(settings, defaults, arg):
    """Apply one --key=value or --key.key=value. SystemExit for an unknown key or a wrong type."""
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
        target[name] = dict(target[name])  # copied, because a config file may give two keys the same dict
        target, prefix = target[name], f"{prefix}{name}."
    check_key(key, target, "command line", prefix)
    default = target[key] if outer else defaults[key]
    target[key] = fit(from_text(text, default), default, f"command line: {arg}")


def check_key(key, settings, place, prefix=""):
    """SystemExit if settings has no such key. prefix: the dotted path of settings, if it is a nested dict."""
    if key not in settings:
        hint = f"did you mean {prefix}{nearest(key, settings)}?" if settings else f"{prefix[:-1]} is empty"
        raise SystemExit(f"{place}: no setting {prefix}{key}; {hint}")


def from_text(text, default):
    """Return the value of a text from the command line, or the text if it cannot be evaluated."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return BOOLS.get(text.lower(), text)
    try:
        return evaluate(text.strip(), {})
    except Exception:
        return text  # fit() will refuse its type


def evaluate(expression, names):
    """Return the value of a Python expression, which may use names and dict. Any Exception may be raised."""
    return eval(expression, names | {"__builtins__": {}, "dict": dict})


def fit(value, default, place):
    """Return value converted to the type of default. SystemExit if that would change its meaning.

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
    raise SystemExit(f"{place} is {value!r}, of type {type(value).__name__}; give {wanted}, like {default!r}")
