"""What scores come to: means, standard errors and tests; the table for the terminal; the paper's Table 7 with ours."""
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from runtime.files import read_array, read_json

TABLE_7 = Path(__file__).resolve().parent.parent / "assets/table7.csv"  # Ø: no such modality; –: not reported
COLOURS = {"T": "#0072B2", "S": "#D55E00", "T->S": "#E69F00", "S->T": "#009E73"}  # Okabe and Ito's
SETTINGS = tuple(COLOURS)  # modality of the context -> modality of the ending
OTHER_MEASURE = {"sum": "mean", "mean": "sum"}


# ---------------------------------------------------------------------------------------------------------------------
# right or wrong

def best_is(scores, answer, ties="share"):
    """float64 [n]: 1 where candidate `answer` has the highest score, 0 where another one has it.

    scores   [n, candidates]
    answer   an index, or one for each row
    ties     among k best candidates: "share" (1/k if the answer is one of them), "wrong" (0), "first" (the first wins)
    """
    answer = np.broadcast_to(answer, len(scores))
    best = scores == scores.max(1, keepdims=True)  # [n, candidates]
    if ties == "first":
        return (best.argmax(1) == answer).astype(float)
    among_best, n_best = best[np.arange(len(best)), answer], best.sum(1)
    return among_best / n_best if ties == "share" else (among_best & (n_best == 1)).astype(float)


def right_by(total, count, ties="share"):
    """{"sum", "mean": float64 [n]}: is the first of two candidates better by summed and by mean log-likelihood?

    total, count: summed log-likelihoods and numbers of scored tokens of the candidates, [2 * n]
    """
    means = total / np.maximum(count, 1)
    return {"sum": best_is(total.reshape(-1, 2), 0, ties), "mean": best_is(means.reshape(-1, 2), 0, ties)}


# ---------------------------------------------------------------------------------------------------------------------
# means and standard errors

def cloze_sums(right):
    """{setting: (sum, sum of squares, number)} of {setting: answers}. These add up over processes."""
    return {name: (answers.sum(), (answers ** 2).sum(), len(answers)) for name, answers in right.items()}


def cloze_table(sums):
    """{setting: {accuracy and its standard error in percent, items}} from {setting: (sum, sum of squares, number)}."""
    rows = {}
    for name, (total, squares, n) in sums.items():
        variance = max(0.0, squares / n - (total / n) ** 2)
        rows[name] = dict(accuracy=100 * total / n, stderr=100 * (variance / n) ** 0.5, items=int(n))
    return rows


def accuracy(right):
    """{accuracy and its standard error in percent, items} of answers between 0 and 1, float64 [n]."""
    return cloze_table({"": (float(np.sum(right)), float(np.sum(np.square(right))), len(right))})[""]


def by_group(right, groups):
    """{group: accuracy of its items}, in alphabetical order."""
    groups = np.asarray(groups)
    return {str(group): accuracy(right[groups == group]) for group in np.unique(groups)}


def over_groups(right, groups):
    """{accuracy, stderr, items, groups}: the unweighted mean over groups. Only items are seen as drawn at random."""
    rows = by_group(right, groups).values()
    mean = float(np.mean([row["accuracy"] for row in rows]))
    stderr = float(np.sum([row["stderr"] ** 2 for row in rows]) ** 0.5 / len(rows))
    return dict(accuracy=mean, stderr=stderr, items=len(right), groups=len(rows))


def nll_table(sums):
    """{kind: {text: nats per token, speech: nats per unit}} from evaluate.heldout_nll's sums."""
    table = {}
    for kind, (text, speech, n_text, n_speech) in sums.items():
        table[kind] = {}
        if n_text:
            table[kind]["text"] = float(text / n_text)
        if n_speech:
            table[kind]["speech"] = float(speech / n_speech)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# do two checkpoints differ?

def compare(ours, theirs, seed=1, resamples=10_000):
    """Do two models differ on the same items? ours, theirs: float64 [items] -> {difference, p (two-sided), test, ...}.

    Where every item is right or wrong: the exact McNemar test, which is a binomial test on the items that only one
    model has right. For other scores (ties, means over voices, NLLs): a bootstrap over items of the mean difference,
    shifted to the null hypothesis.
    """
    difference = ours - theirs
    if np.isin([ours, theirs], (0, 1)).all():
        only_first, only_second = int((difference > 0).sum()), int((difference < 0).sum())
        n = only_first + only_second
        p = float(binomtest(only_first, n).pvalue) if n else 1.0
        return dict(difference=float(difference.mean()), p=p, test="McNemar", only_first=only_first,
                    only_second=only_second)
    rng, n, mean = np.random.default_rng(seed), len(difference), difference.mean()
    values, counts = np.unique(difference - mean, return_counts=True)
    # To draw n items with replacement is to draw how often each value comes.
    means = np.array([rng.multinomial(n, counts / n) @ values / n for _ in range(resamples)])
    extreme = int((abs(means) >= abs(mean) - 1e-12).sum())
    return dict(difference=float(mean), p=(extreme + 1) / (resamples + 1), test="bootstrap", resamples=resamples)


def item_path(path, task, name):
    """The .npy file of one array of items that belongs to an evaluation.json."""
    return Path(path).with_suffix(".items") / f"{task}.{name.replace('->', '-to-')}.npy"


def compare_results(first, second):
    """{task.setting: comparison} of two evaluation.json files, for what both scored.

    Differences are in percent for answers and in nats per token for NLLs. ValueError if the two did not score the same
    items in the same way.
    """
    made = []
    for path in (first, second):
        made.append(read_json(path).get("made"))
        if not isinstance(made[-1], dict):
            raise ValueError(f"{path}: no results of evaluate.py; give its evaluation.json or a checkpoint")
    comparisons = {}
    for task in made[0]:
        if task not in made[1]:
            continue
        ours, theirs = made[0][task], made[1][task]
        for key in ("protocol", "files"):
            if ours[key] != theirs[key]:
                raise ValueError(f"{second}: {task} has other {key} than {first}; score both the same way")
        for name in ours["items"]:
            if name in theirs["items"] and (name.endswith("right") or name == "nll"):
                comparison = compare_items(first, second, task, name)
                comparisons[".".join([task, *name.split(".")[:-1]])] = comparison
    return comparisons


def compare_items(first, second, task, name):
    """The comparison of one array of answers ("right") or of NLLs ("nll")."""
    def both(name):
        ours, theirs = (np.array(read_array(item_path(path, task, name))) for path in (first, second))
        if ours.shape != theirs.shape:
            raise ValueError(f"{item_path(second, task, name)}: {theirs.shape} items, not {ours.shape}")
        return ours, theirs

    ours, theirs = both(name)
    if name == "nll":
        tokens, their_tokens = both("tokens")
        if not np.array_equal(tokens, their_tokens):
            raise ValueError(f"{second}: {task} has other tokens than {first}")
        return compare(ours / tokens.mean(), theirs / tokens.mean())  # per token, at the mean length
    comparison = compare(ours, theirs)
    comparison["difference"] *= 100
    return comparison


# ---------------------------------------------------------------------------------------------------------------------
# tables

def table_7_row(results):
    """Our row of Table 7, as strings; "" for what was not scored."""
    def percent(*keys):
        value = results
        for key in keys:
            value = (value or {}).get(key)
        return "" if value is None else f"{value:.1f}"

    size, tokens = results["parameters"], results.get("tokens")
    stories = [percent(task, setting, "accuracy") for task in ("tstorycloze", "sstorycloze") for setting in SETTINGS]
    before, after = percent("before", "acc_norm", "accuracy"), percent("mmlu", "acc_norm", "accuracy")
    return [results["checkpoint"], f"{size / 1e6:.3g}M" if size < 1e9 else f"{size / 1e9:.3g}B",
            f"{tokens / 1e9:.3g}B" if tokens else "", percent("blimp", "accuracy"),
            percent("sblimp", "dev", "accuracy"), *stories, " / ".join(filter(None, [after, before]))]


def score_rows(results):
    """[name, score, number of items, protocol] of every accuracy and of every NLL but those of random windows."""
    rows = []
    for task, made in results["made"].items():
        if task == "nll":
            continue
        part, protocol = results[task], dict(made["protocol"])
        protocol |= {key: value for key, value in made.get("notes", {}).items() if key in protocol}
        about = ", ".join(f"{key}={value}" for key, value in protocol.items())
        scores = {"": part} if "accuracy" in part or "nll" in part else part
        for name, row in scores.items():
            if not isinstance(row, dict) or "stderr" not in row:
                continue
            if "nll" in row:
                value, number = f"{row['nll']:.3f}", f"{row['documents']} documents"
            else:
                value, number = f"{row['accuracy']:.2f}", f"{row['items']} items"
            rows.append([f"{task} {name}".strip(), f"{value} ± {row['stderr']:.2g}", number, about])
    return rows


def markdown_table(header, *rows):
    """The lines of a table; empty cells become a dash."""
    lines = [[cell or "–" for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def as_markdown(results):
    """Table 7 with our row, all other scores beneath it, and the comparison if there is one."""
    paper = [line.split(";") for line in TABLE_7.read_text(encoding="utf-8").splitlines()]
    ours = [f"**{cell}**" if cell else "" for cell in table_7_row(results)]
    lines = ["Table 7 of the paper, and this checkpoint. Ø: it lacks the modality; –: not reported, or not scored.", "",
             *markdown_table(*paper, ours)]
    if rows := score_rows(results):
        lines += markdown_table(["score", "% right, or nats per token, ± standard error", "of", "protocol"], *rows)
    if versus := results.get("versus"):
        rows = [[name, f"{test['difference']:+.3f}", f"{test['p']:.2g}", test["test"]]
                for name, test in versus["scores"].items()]
        lines += [f"Against {versus['checkpoint']}:", "",
                  *markdown_table(["score", "difference (%, nats)", "p", "test"], *rows)]
    return "\n".join(lines)


def as_text(results):
    """The results as small tables for the terminal."""
    lines = []
    if results.get("nll"):
        lines.append("held-out NLL         text, nats/token   speech, nats/unit")
        for kind, nll in results["nll"].items():
            cells = [f"{nll[stream]:20.3f}" if stream in nll else " " * 20 for stream in ("text", "speech")]
            lines.append(f"  {kind:12}" + "".join(cells))
    if cloze := results.get("topic_cloze"):
        items = next(iter(cloze.values()))["items"]
        title = f"Topic-Cloze, % of {items} items"
        lines.append(title + "".join(f"{setting:>14}" for setting in cloze))
        cells = [f"{cell['accuracy']:7.1f} ± {cell['stderr']:<4.1f}" for cell in cloze.values()]
        lines.append(" " * len(title) + "".join(cells))
    for name, score, items, _ in score_rows(results) if "made" in results else ():
        if not name.startswith("topic_cloze"):
            lines.append(f"{name:20}{score:>16}   {items}")
    if versus := results.get("versus"):
        for name, test in versus["scores"].items():
            lines.append(f"{name:20}{test['difference']:+16.3f}   p = {test['p']:.2g} ({test['test']}) against"
                         f" {versus['checkpoint']}")
    return "\n".join(lines)
