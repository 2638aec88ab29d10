"""
What scores come to: means, standard errors, tests; the terminal's table, and the paper's Table 7 with ours beside it.
"""
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from foreign import read_array, read_json

TABLE_7 = Path(__file__).parent / "assets/table7.csv"  # the paper's; Ø: the model lacks the modality, –: not reported
COLOURS = {"T": "#0072B2", "S": "#D55E00", "T->S": "#E69F00", "S->T": "#009E73"}  # Okabe and Ito's
SETTINGS = tuple(COLOURS)


def cloze_table(sums):
    """{setting: {accuracy and its standard error in percent, items}} from {setting: (sum, sum of squares, number)}."""
    def row(s, squares, n):
        return dict(accuracy=100 * s / n, stderr=100 * max(0.0, (squares / n - (s / n) ** 2) / n) ** 0.5, items=int(n))
    return {name: row(*values) for name, values in sums.items()}


def cloze_sums(right):
    """{setting: (sum, sum of squares, number)} of topic_cloze's answers, which add up over processes."""
    return {name: (r.sum(), (r ** 2).sum(), len(r)) for name, r in right.items()}


def accuracy(right):
    """{accuracy and its standard error in percent, items} of answers between 0 and 1, float64 [n]."""
    return cloze_table({"": (float(np.sum(right)), float(np.sum(np.square(right))), len(right))})[""]


def by_group(right, groups):
    """{group: accuracy of its items}, in alphabetical order."""
    groups = np.asarray(groups)
    return {str(g): accuracy(right[groups == g]) for g in np.unique(groups)}


def over_groups(right, groups):
    """Unweighted mean over groups: {accuracy, stderr, items, groups}; the groups are fixed, their items are drawn."""
    rows = by_group(right, groups).values()
    return dict(accuracy=float(np.mean([r["accuracy"] for r in rows])),
                stderr=float(np.sum([r["stderr"] ** 2 for r in rows]) ** 0.5 / len(rows)), items=len(right),
                groups=len(rows))


def compare(ours, theirs, seed=1, resamples=10_000):
    """Do two models differ? ours, theirs: answers between 0 and 1, float64 [items] of the same items.

    Right or wrong: the exact McNemar test, a binomial test on the items that only one has right. Other scores (ties,
    means over voices, NLLs): bootstrap over items of the mean difference, shifted to the null hypothesis.
    Returns {difference, p, test, ...}; p is two-sided.
    """
    difference = ours - theirs
    if np.isin([ours, theirs], (0, 1)).all():
        only, other = int((difference > 0).sum()), int((difference < 0).sum())
        p = binomtest(only, only + other).pvalue if only + other else 1.0
        return dict(difference=float(difference.mean()), p=float(p), test="McNemar", only_first=only, only_second=other)
    rng, n, mean = np.random.default_rng(seed), len(difference), difference.mean()
    values, counts = np.unique(difference - mean, return_counts=True)  # to draw n items is to draw how often each value
    means = np.array([rng.multinomial(n, counts / n) @ values / n for _ in range(resamples)])
    extreme = int((abs(means) >= abs(mean) - 1e-12).sum())
    return dict(difference=float(mean), p=(extreme + 1) / (resamples + 1), test="bootstrap", resamples=resamples)


def compare_results(first, second):
    """{task.setting: comparison} of two evaluation.json files, for what both scored on the same items in the same way.

    In percent for answers, in nats per token for NLLs.
    """
    both, found = [read_json(path) for path in (first, second)], {}
    for path, results in zip((first, second), both):
        if not isinstance(results.get("made"), dict):
            raise ValueError(f"{path}: no results of evaluate.py; give its evaluation.json or a checkpoint")
    for task in both[0]["made"]:
        a, b = (results["made"].get(task) for results in both)
        if not a or not b:
            continue
        for key in ("protocol", "files"):
            if a[key] != b[key]:
                raise ValueError(f"{second}: {task} has other {key} than {first}; score both the same way")
        for name in (name for name in a["items"] if name in b["items"]):
            arrays = [np.array(read_array(item_path(path, task, name))) for path in (first, second)]
            if arrays[0].shape != arrays[1].shape:
                raise ValueError(f"{item_path(second, task, name)}: {arrays[1].shape} items, not {arrays[0].shape}")
            if name.endswith("right"):
                test = compare(*arrays)
                test["difference"] *= 100
            elif name == "nll":  # per token, at the mean length
                tokens = [np.array(read_array(item_path(path, task, "tokens"))) for path in (first, second)]
                if not np.array_equal(*tokens):
                    raise ValueError(f"{second}: {task} has other tokens than {first}")
                test = compare(*(x / tokens[0].mean() for x in arrays))
            else:
                continue
            found[".".join([task, *name.split(".")[:-1]])] = test
    return found


# ---------------------------------------------------------------------------------------------------------------------
# tables

def nll_table(sums):
    """{kind: {text: nats per token, speech: nats per unit}} from heldout_nll's sums."""
    return {kind: {name: float(s[i] / s[i + 2]) for i, name in enumerate(("text", "speech")) if s[i + 2]}
            for kind, s in sums.items()}


def item_path(path, task, name):
    """The .npy file of per-item scores that belongs to an evaluation.json."""
    return Path(path).with_suffix(".items") / f"{task}.{name.replace('->', '-to-')}.npy"


def cells(results):
    """Our row of Table 7."""
    def percent(*keys):
        found = results
        for key in keys:
            found = (found or {}).get(key)
        return "" if found is None else f"{found:.1f}"
    size = results["parameters"]
    stories = [percent(task, s, "accuracy") for task in ("tstorycloze", "sstorycloze") for s in SETTINGS]
    mmlu = [percent(when, "acc_norm", "accuracy") for when in ("mmlu", "before")]
    return [results["checkpoint"], f"{size / 1e6:.3g}M" if size < 1e9 else f"{size / 1e9:.3g}B",
            f"{results['tokens'] / 1e9:.3g}B" if results.get("tokens") else "", percent("blimp", "accuracy"),
            percent("sblimp", "dev", "accuracy"), *stories,
            " / ".join(filter(None, mmlu))]


def score_rows(results):
    """[name, score, number of items, protocol] of every accuracy and NLL but those of windows."""
    rows = []
    for task in (t for t in results["made"] if t != "nll"):
        part = results[task]
        parts = {"": part} if "accuracy" in part or "nll" in part else part
        parts = {k: v for k, v in parts.items() if isinstance(v, dict) and "stderr" in v}
        made = results["made"][task]
        protocol = made["protocol"] | {k: v for k, v in made.get("notes", {}).items() if k in made["protocol"]}
        for name, row in parts.items():
            unit, n = ("nll", "documents") if "nll" in row else ("accuracy", "items")
            rows.append([f"{task} {name}".strip(), f"{row[unit]:.{3 if unit == 'nll' else 2}f} ± {row['stderr']:.2g}",
                         f"{row[n]} {n}", ", ".join(f"{k}={v}" for k, v in protocol.items())])
    return rows


def as_markdown(results):
    """Table 7 with our row, all other scores beneath, and the comparison if there is one."""
    def table(*rows):
        rows = [[cell or "–" for cell in row] for row in rows]
        return ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]] + [""]
    paper = [line.split(";") for line in TABLE_7.read_text(encoding="utf-8").splitlines()]
    lines = ["Table 7 of the paper, and this checkpoint. Ø: it lacks the modality; –: not reported, or not scored.", "",
             *table(*paper, [f"**{cell}**" if cell else "" for cell in cells(results)])]
    rows = score_rows(results)
    if rows:
        lines += table(["score", "% right, or nats per token, ± standard error", "of", "protocol"], *rows)
    if results.get("versus"):
        lines += [f"Against {results['versus']['checkpoint']}:", "",
                  *table(["score", "difference (%, nats)", "p", "test"],
                         *([k, f"{v['difference']:+.3f}", f"{v['p']:.2g}", v["test"]] for k, v in
                           results["versus"]["scores"].items()))]
    return "\n".join(lines)


def as_text(results):
    """The results as small tables for the terminal."""
    lines = []
    if results.get("nll"):
        lines += ["held-out NLL         text, nats/token   speech, nats/unit"]
        for kind, nll in results["nll"].items():
            cells = (f"{nll[m]:20.3f}" if m in nll else " " * 20 for m in ("text", "speech"))
            lines.append(f"  {kind:12}" + "".join(cells))
    if results.get("topic_cloze"):
        cells = results["topic_cloze"]
        lines += [f"Topic-Cloze, % of {next(iter(cells.values()))['items']} items" + "".join(f"{s:>14}" for s in cells)]
        lines += [" " * (len(lines[-1]) - 14 * len(cells)) +
                  "".join(f"{c['accuracy']:7.1f} ± {c['stderr']:<4.1f}" for c in cells.values())]
    for name, score, items, _ in score_rows(results) if "made" in results else ():
        if not name.startswith("topic_cloze"):
            lines.append(f"{name:20}{score:>16}   {items}")
    for name, v in results.get("versus", {}).get("scores", {}).items():
        lines.append(f"{name:20}{v['difference']:+16.3f}   p = {v['p']:.2g} ({v['test']}) against"
                     f" {results['versus']['checkpoint']}")
    return "\n".join(lines)
