"""
Settings: the defaults in a script, changed by a config file, changed by the command line.

    config, name = configure(dict(steps=100, learning_rate=3e-4), sys.argv[1:])

    python train.py config/train_tiny.py --seed=2 --stages.stage2.steps=100

A config file is plain assignments, `learning_rate = 10 * 3e-4`. It is read, never run: values are numbers, strings,
True and False, lists, dicts (`{...}` or `dict(...)`), arithmetic on them, and names assigned earlier in the same file;
a name that starts with `_` only serves later lines. `base = "train_tiny.py"`, a file beside it, is applied first.
A dict or list replaces the default's whole; on the command line `--stages.stage2.steps=100` changes one value in one.
Every value takes the type of its default (where that is a list, a dict will do: data folders with their weights).
Whatever is wrong ends the script with one line.
"""
import ast
import copy
import difflib
import operator
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
             ast.UAdd: operator.pos, ast.USub: operator.neg}
ERRORS = (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError)  # of reading an expression
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def configure(defaults, argv, complete=lambda settings: None):
    """(settings, name): defaults {name: bool, int, float, str, list or dict}, changed by what argv says.

    argv: at most one config file, relative to the current folder or else to this one, and any number of --key=value,
    which win over the file. settings: a new dict, in the order of defaults. name: the file's stem, or "default".
    complete(settings): fills in what a file or a line may leave out of nested dicts, before and after the line's turn.
    Raises SystemExit: code 0 after --help, else one line that names the key, the place and the remedy.
    """
    settings, name = copy.deepcopy(defaults), "default"
    if {"-h", "--help"} & set(argv):
        print_help(defaults)
        sys.exit(0)
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        raise SystemExit(f"{files[1]}: a second config file after {files[0]}; give one, and overrides as --key=value")
    for file in files:
        apply_file(settings, defaults, find_config(file, [Path(), ROOT]))
        name = Path(file).stem
    complete(settings)
    for arg in argv:
        if arg not in files:
            apply_override(settings, defaults, arg)
    complete(settings)
    return settings, name


def print_help(defaults):
    """Every setting, its default, and the comment beside it in the script that runs."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "SCRIPT")
    source = script.read_text(encoding="utf-8") if script.is_file() else ""
    comments = dict(re.findall(r"^(\w+) = .*?  # (.*)$", source, re.MULTILINE))
    print(f"python {script.name} [config/FILE.py] [--key=value ...]\n")
    for key, value in defaults.items():
        print(f"  --{key}={value}".ljust(40), comments.get(key, ""))


def find_config(file, folders):
    """The path of a config file in the first of the folders that has it."""
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    places = [*((folder / file).parent for folder in folders), ROOT / "config"]
    there = {path.name: os.path.relpath(path) for place in places for path in place.glob("*.py")}
    hint = f"did you mean {there[nearest(Path(file).name, there)]}?" if there else "give the path of one that is there"
    raise SystemExit(f"{file}: no such config file; {hint}")


def nearest(name, names):
    """The one of names that is spelled most like name."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def apply_file(settings, defaults, path, above=()):
    """Assign what a config file says, its base first. above: the files whose base this is, to refuse a circle."""
    if path.resolve() in above:
        raise SystemExit(f"{path}: starts from itself; take out a base = line in {' or '.join(p.name for p in above)}")
    assigned = read_file(path)
    if "base" in assigned:
        start = find_config(str(assigned.pop("base")[0]), [path.parent])
        apply_file(settings, defaults, start, (*above, path.resolve()))
    for key, (value, where) in assigned.items():
        if not key.startswith("_"):
            check_key(key, settings, where)
            settings[key] = fit(value, defaults[key], where)


def read_file(path):
    """{name: (value, where it stands)} of a config file's assignments, nothing of it run."""
    try:
        statements = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise SystemExit(f"{path}: is not Python ({error}); write lines of name = value") from None
    assigned = {}
    for statement in statements:
        place = f"{path}:{statement.lineno}: {ast.unparse(statement).splitlines()[0]}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                try:
                    value = evaluate(node, {name: value for name, (value, _) in assigned.items()})
                except ERRORS as error:
                    raise SystemExit(f"{place}: {error}; write numbers, strings, lists, dicts, arithmetic") from None
                assigned[key] = value, place
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case _:
                raise SystemExit(f"{place}: cannot stand in a config file; write lines of name = value")
    return assigned


def apply_override(settings, defaults, arg):
    """Assign what one --key=value or --key.key=value says."""
    where = "command line"
    if not arg.startswith("--") or "=" not in arg:
        raise SystemExit(f"{where}: {arg} has no value; write --{arg.lstrip('-') or 'key'}=value")
    dotted, text = arg[2:].split("=", 1)
    *path, key = dotted.split(".")
    inside, prefix = settings, ""
    for step in path:
        check_key(step, inside, where, prefix)
        inside, prefix = inside[step], f"{prefix}{step}."
        if not isinstance(inside, dict):
            raise SystemExit(f"{where}: {arg}: {prefix[:-1]} is {inside!r}, which has nothing inside; "
                             f"write --{prefix[:-1]}=value")
    check_key(key, inside, where, prefix)
    like = inside[key] if path else defaults[key]
    inside[key] = fit(from_text(text, like), like, f"{where}: {arg}")


def check_key(key, settings, where, prefix=""):
    if key not in settings:
        hint = f"did you mean {prefix}{nearest(key, settings)}?" if settings else f"{prefix[:-1]} is empty"
        raise SystemExit(f"{where}: no setting {prefix}{key}; {hint}")


def from_text(text, default):
    """What a text from the command line means where default stands now; the text itself if nothing else."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return WORDS.get(text.lower(), text)
    try:
        return evaluate(ast.parse(text.strip(), mode="eval").body, {})
    except ERRORS:
        return text  # not of the type that is wanted, as fit() will say


def fit(value, default, where):
    """value as the type of default; nothing is lost: 1e6 is an int and 1 a float, but 1.5 is no int and 1 no bool."""
    kind = type(default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and value == value // 1:
        return int(value)
    if kind is list and isinstance(value, (tuple, dict)):
        return list(value) if isinstance(value, tuple) else value  # folders, or folders with weights
    if type(value) is kind:
        return value
    wanted = "true or false" if kind is bool else f"a value of type {kind.__name__}"
    raise SystemExit(f"{where} is {value!r}, of type {type(value).__name__}; give {wanted}, like {default!r}")


def evaluate(node, names):
    """The value of an expression: literals, arithmetic, dict(), and the names given. ValueError on anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in names:
            return copy.deepcopy(names[name])
        case ast.List(elts=items):
            return [evaluate(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(evaluate(item, names) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {evaluate(k, names): evaluate(v, names) for k, v in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs) if all(pair.arg for pair in pairs):
            return {pair.arg: evaluate(pair.value, names) for pair in pairs}
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return apply(op, evaluate(left, names), evaluate(right, names))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(operand, names))
    raise ValueError(f"`{ast.unparse(node)}` cannot stand in a setting")


def apply(op, left, right):
    """left op right; ValueError for what could fill the memory: numbers of 4096 bits, lists of 100,000 elements."""
    sizes = [x.bit_length() if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0 for x in (left, right)]
    sequence = any(hasattr(x, "__len__") for x in (left, right))
    times = next((x for x in (right, left) if isinstance(x, int)), 1)
    if isinstance(op, ast.Pow) and isinstance(right, int) and not isinstance(left, float):
        large = sizes[0] * right > 4096
    elif isinstance(op, ast.Mult) and sequence:
        large = max(len(x) for x in (left, right) if hasattr(x, "__len__")) * times > 100_000
    else:  # "%9999999d" % 1 is a formatted text, not arithmetic
        large = sum(sizes) > (100_000 if sequence else 4096) or isinstance(op, ast.Mod) and isinstance(left, str)
    if large:
        raise ValueError("is too large for a setting")
    return OPERATORS[type(op)](left, right)
