"""Mutations of the files of strangers, for tests/fuzz.py: functions (random.Random, bytes) -> bytes."""
import contextlib
import itertools
import json
import math
import re
import struct

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "-0", "1e999", "-1e999", "1e-999", "99999999999999999999", "1_0", "0x10",
           "", "1.5", "255", "65535", "65536", "2147483647", "2147483648", "4294967295", "9223372036854775807", "1e5",
           "٣"]
TEXTS = [b"\0", b"\xff", b"\xed\xa0\x80", "\u2028".encode(), b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n", b'"', b"'",
         b"\\", b"{", b"}", b"[", b"]", b"<", b">", b"&", b",", b"\t", b"../", b"/etc/passwd", b"x" * 5000, b" " * 3000,
         b"[" * 3000, b"[" * 200000, b"<a>" * 20000, "ﷺ½漢".encode(), b"true", b"null", b"NaN", b"%s", b"1e999"]
INTS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
        (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def span(rng, raw, most=64):
    """A random slice of raw, start and end."""
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + rng.randint(1, rng.choice([1, 4, most])))


def flip(rng, raw):
    if not raw:
        return raw
    i = rng.randrange(len(raw))
    return raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1:]


def cut(rng, raw):
    a, b = span(rng, raw, 4096)
    return raw[:a] + raw[b:]


def repeat(rng, raw):
    a, b = span(rng, raw, 512)
    return raw[:b] + raw[a:b] * rng.choice([1, 1, 2, 50]) + raw[b:]


def insert(rng, raw):
    a, _ = span(rng, raw)
    return raw[:a] + rng.choice([rng.randbytes(rng.randint(1, 20)), rng.choice(TEXTS)]) + raw[a:]


def truncate(rng, raw):
    return raw[:rng.randrange(len(raw) + 1)]


def exchange(rng, raw):
    (a, b), (c, d) = sorted([span(rng, raw), span(rng, raw)])
    return raw if b > c else raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def integer(rng, raw):
    """Some bytes become a length or count that is likely to matter; half the time near the beginning."""
    size = rng.choice([1, 2, 4, 8])
    i = rng.randrange(max(1, min(len(raw), rng.choice([64, 1 << 30])) - size))
    return raw[:i] + (rng.choice(INTS) % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "big"])) + raw[i + size:]


BYTES = [flip, flip, cut, repeat, insert, truncate, exchange, integer]


def other_number(rng, raw):
    """Another number in the place of one, or that one changed a little."""
    found = list(itertools.islice(re.finditer(rb"-?\d+(?:\.\d+)?", raw), 2000))
    if not found:
        return raw
    match = rng.choice(found)
    near = str(round(float(match[0]) + rng.choice([-1, 1, 0.01, -100]), 3)).encode() if len(match[0]) < 20 else b"7"
    return raw[:match.start()] + rng.choice([near, rng.choice(NUMBERS).encode()]) + raw[match.end():]


def lines(rng, raw):
    """A line twice, no more, elsewhere, or in reverse."""
    parts = raw.split(b"\n")
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    change = rng.randrange(4)
    if change == 0:
        parts.insert(j, parts[i])
    elif change == 1:
        del parts[i]
    elif change == 2:
        parts[i], parts[j] = parts[j], parts[i]
    else:
        parts[i] = b" ".join(reversed(parts[i].split(b" ")))
    return b"\n".join(parts)


def exchange_words(rng, raw):
    found = list(itertools.islice(re.finditer(rb"[^\s\"{}\[\],:<>=]+", raw), 2000))
    if len(found) < 2:
        return raw
    a, b = sorted(rng.sample(found, 2), key=lambda match: match.start())
    return raw[:a.start()] + b[0] + raw[a.end():b.start()] + a[0] + raw[b.end():]


TEXT = [*BYTES, other_number, other_number, other_number, lines, lines, exchange_words]
VALUES = [None, True, False, -1, 0, 1, 2, 1.5, 1e308, 10**30, 1 << 31, 1 << 63, 65536, "", "a", "\ud800", "a\nb", "\0",
          "../x", "x" * 5000, [], {}, [1], [[]], {"a": 1}, "@deep", "@deeper", "@nan", "@inf"]
SPECIAL = {'"@deep"': "[" * 500 + "]" * 500, '"@deeper"': '{"a":' * 100000 + "1" + "}" * 100000, '"@nan"': "NaN",
           '"@inf"': "1e999"}


def dump(value):
    text = json.dumps(value, ensure_ascii=False)
    for name, said in SPECIAL.items():
        text = text.replace(name, said)
    return text.encode("utf-8", errors="surrogatepass" if len(text) % 2 else "backslashreplace")


def nodes(value):
    """(container, key) of everything inside a value; of long containers the first few and the last."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:40] + keys[40:][-2:]:
            yield value, key
            yield from nodes(value[key])


def change_value(rng, value):
    """A json value with one thing in it of another type, gone, twice, elsewhere, or a little larger."""
    value = json.loads(json.dumps(value))
    places = list(nodes(value))
    if not places:
        return rng.choice(VALUES)
    (there, key), (other, from_key) = rng.choice(places), rng.choice(places)
    change, before = rng.randrange(6), there[key]
    if change <= 1:
        there[key] = rng.choice(VALUES)
    elif change == 2:
        there[key] = json.loads(json.dumps(other[from_key]))
    elif change == 3:
        del there[key]
    elif change == 4 and type(before) in (int, float):
        there[key] = before + rng.choice([-1, 1, 1000, -0.5])
    elif isinstance(there, dict):
        there[rng.choice(["", "a", key + "s", str(from_key), "kind", "\ud800"])] = there.pop(key)
    else:
        there.insert(key, there[key])
    return value


def json_value(rng, raw):
    """change_value in a json file, or in one line of a file of json lines."""
    parts = raw.split(b"\n") if raw.count(b"\n{") else [raw]
    i = rng.randrange(len(parts))
    with contextlib.suppress(ValueError, RecursionError):
        parts[i] = dump(change_value(rng, json.loads(parts[i])))
    return b"\n".join(parts)


def json_twice(rng, raw):
    """A key stands twice, with another value."""
    found = list(itertools.islice(re.finditer(rb'"(\w+)": ?', raw), 500))
    if not found:
        return raw
    match = rng.choice(found)
    return raw[:match.start()] + match[0] + dump(rng.choice(VALUES)) + b"," + raw[match.start():]


JSON = [json_value] * 8 + [json_twice, other_number, other_number, insert, cut, truncate, flip]


def reformat(rng, raw):
    """The same json: other white space, keys in another order."""
    return json.dumps(json.loads(raw), indent=rng.choice([None, 0, 3]), sort_keys=rng.random() < 0.5).encode()


def tensor_header(rng, raw):
    """The header of a safetensors file: offsets, dtypes, shapes, names; its length fits again, mostly."""
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8:8 + size])
        for _, about in ([name for name in header.items() if rng.random() < 0.1] or list(header.items())[:1]):
            what = rng.randrange(4)
            if what == 0 and "dtype" in about:
                about["dtype"] = rng.choice(["F64", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U8", "X"])
            elif what == 1 and about.get("shape"):
                about["shape"] = rng.choice([about["shape"][::-1], [1, *about["shape"]], [math.prod(about["shape"])],
                                             [1 << 62, 4], [0], [-1], [1 << 40]])
            elif what == 2 and "data_offsets" in about:
                about["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 1, 1 << 40, -(1 << 20)])
        header = dump(change_value(rng, header) if rng.random() < 0.5 else header)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return raw
    size = len(header) + rng.choice([0, 0, 0, 0, 1, -1, 1 << 30, 1 << 62])
    return size.to_bytes(8, "little", signed=True) + header + raw[8 + int.from_bytes(raw[:8], "little"):]


def tensor_padding(rng, raw):
    """The same tensors: the header is longer by some spaces."""
    size, more = int.from_bytes(raw[:8], "little"), 8 * rng.randrange(4)
    return (size + more).to_bytes(8, "little") + raw[8:8 + size] + b" " * more + raw[8 + size:]


SHAPES = ["()", "(1,)", "(-1,)", "(2, 2)", "(9999999999999999999,)", "(0,)", "(1 << 40,)", "(True,)", "(4.0,)", "[4]",
          "(" * 300, "(1,) * 9"]


def array_header(rng, raw):
    """The header of an .npy file: type, order, shape, version, length."""
    size = int.from_bytes(raw[8:10], "little")
    header = raw[10:10 + size].decode("latin-1").strip()
    for _ in range(rng.randint(1, 2)):
        header = rng.choice([
            lambda h: re.sub(r"'descr': [^,]*", "'descr': " + rng.choice(
                ["'<u4'", "'>u2'", "'|O'", "'<f8'", "'|S2'", "'<M8[s]'", "[('a', '<u2')]", "'u3'",
                 "'" + "(" * 500 + "'", "'<i8'", "'|b1'", "'<c16'", "None"]), h),
            lambda h: h.replace("False", rng.choice(["True", "1", "None", "not False"])),
            lambda h: re.sub(r"\([^)]*\)", rng.choice(SHAPES), h),
            lambda h: h.replace("'shape'", rng.choice(["'shapes'", "'descr'", "__import__('os')"])),
            lambda h: re.sub(r"\d+(?=,)", lambda m: str(int(m[0]) + rng.choice([-1, 1, 64])), h),
            lambda h: h + "'" * rng.randrange(2)])(header)
    header = header.encode("latin-1").ljust(size - 1) + b"\n"
    version = rng.choice([b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\xff\0"])
    return raw[:6] + version + struct.pack("<H", len(header) % 65536) + header + raw[10 + size:]


def array_values(rng, raw):
    """One number of an .npy file, or two exchanged; what the file says of itself stays right."""
    start = 10 + int.from_bytes(raw[8:10], "little")
    size = 8 if b"8'" in raw[:start] else 4 if b"4'" in raw[:start] else 2
    if len(raw) < start + size:
        return raw
    at = [start + size * rng.randrange((len(raw) - start) // size) for _ in range(2)]
    value = rng.choice([rng.choice(INTS).to_bytes(8, "little")[:size], raw[at[1]:at[1] + size]])
    return raw[:at[0]] + value + raw[at[0] + size:]


NPY = [array_header] * 4 + [array_values] * 4 + BYTES
SAFETENSORS = [tensor_header] * 6 + BYTES


def csv_fields(rng, raw):
    return rng.choice([lambda: raw.replace(b",", rng.choice([b";", b",,", b',"', b'"']), 1), lambda: raw + b",",
                       lambda: raw.replace(b'"', b"", 1), lambda: raw.replace(b"\n", b"\r", 1), lambda: raw + b"\0",
                       lambda: raw + b"x" * 200000])()


PATHS = ["../secret.wav", "/etc/passwd", "a/../../secret.wav", "out/secret.wav", "link.wav", "./a.wav", "a//../a.wav",
         "", ".", "..", "a.wav/", "a.wav\0.wav", "x" * 300 + ".wav", "x/" * 3000 + "a.wav", "a\nb.wav", "\udcff.wav",
         "\u202ea.wav", "~/a.wav", "file:///etc/passwd", "C:\\a.wav", "out/../../secret.wav", "loop/loop/a.wav",
         "%2e%2e/a.wav"]


def path_in(rng, raw):
    """A path or a name in a manifest leads elsewhere."""
    found = list(re.finditer(rb"[\w/.-]*\b(?:a|b|c|s)\b(?:\.wav|\.flac|\.ogg)?", raw))
    if not found:
        return raw
    match, path = rng.choice(found), rng.choice(PATHS)
    path = rng.choice([path, path.removesuffix(".wav"), json.dumps(path)[1:-1]])
    return raw[:match.start()] + path.encode("utf-8", errors="surrogateescape") + raw[match.end():]
