"""The Markdown file: errors, tables 2 and 3 beside the paper's, what is stored, and the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev

from benchmarks import output
from benchmarks.cpu.report import Table

from .nets import NETS, ROUNDS, Net, stages
from .tables import Measured

PARAMETERS = {"lenet-300-100": "267K to 22K, 12x", "lenet-5": "431K to 36K, 12x"}  # table 1


@dataclass
class Results:
    """Everything measured; the JSON file is this.

    Attributes:
        curves: label to points of share pruned and error; dense: label to error, both of figure 5.
        sensitivity: net to layer to error by density; its baseline is the dense net's error.
        bands: of figure 4, share kept in the middle 14 columns of the image and in the outer 14.
    """

    facts: dict[str, str | int]
    measured: list[Measured] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    densities: tuple[float, ...] = ()
    sensitivity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bands: tuple[float, float] = (0.0, 0.0)

    def of(self, net: str) -> list[Measured]:
        return [m for m in self.measured if m.net == net]


def spread(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Mean and, of more than one, standard deviation."""
    values = list(values)
    text = form.format(fmean(values))
    return f"{text} ± {form.format(stdev(values))}" if len(values) > 1 else text


def percent(values: Iterable[float], form: str = "{:.2f}") -> str:
    return spread((100 * v for v in values), form)


def size(number: float) -> str:
    return f"{number / 1000:,.0f}K" if number >= 10_000 else f"{number / 1000:.1f}K"


def errors(results: Results) -> Table:
    """Each seed, and all."""
    columns = [
        "net",
        "seed",
        "dense",
        "pruned",
        "retrained",
        "parameters",
        "rate",
        "paper",
    ]
    table = Table(
        "Error before and after",
        "Wrong of the 10,000 test images, in percent; parameters that are not zero, biases counted. The last "
        "line of a net is the mean ± the standard deviation over the seeds. The column in the middle is "
        "the worst right after a pruning in the last of three rounds, before it retrains.",
        columns,
    )
    for name, net in NETS.items():
        found = results.of(name)
        for m in found:
            table.rows.append([net.title, str(m.seed), *_errors([m]), *_rates([m]), ""])
        paper = f"{net.before:.2f} to {net.after:.2f}; {PARAMETERS[name]}"
        table.rows.append([f"**{net.title}**", "all", *_errors(found), *_rates(found), paper])
    return table


def _errors(found: list[Measured]) -> list[str]:
    return [percent(v) for v in zip(*((m.before, m.pruned, m.after) for m in found), strict=True)]


def _rates(found: list[Measured]) -> list[str]:
    return [f"{found[0].parameters:,} to {found[0].alive:,}", f"{min(m.rate for m in found):.1f}x"]


def rounds(results: Results, net: Net) -> Table:
    table = Table(
        f"{net.title}: the rounds",
        "Mean over the seeds: share of weights that are not zero, error after pruning and after training. "
        "A stage that trains one kind of layer has the other kind fixed. The paper retrains at a tenth. "
        "How long and at which rate the last turns go was chosen by the errors of earlier runs like this one on "
        "the same test images.",
        ["stage", "epochs", "rate", "L2", "weights", "pruned", "trained"],
    )
    plan = stages(net, bool(results.facts["quick"]))
    for stage, *records in zip(plan, *(m.records for m in results.of(net.name)), strict=True):
        pruned = percent(r["pruned"] for r in records) if stage.prune else ""
        share = f"{100 * records[0]['density']:.1f}%"
        trained = percent(r["error"] for r in records)
        how = [str(stage.epochs), f"{stage.rate:g}", f"{stage.l2:g}"]
        table.rows.append([stage.name, *how, share, pruned, trained])
    return table


def layers(results: Results, net: Net) -> Table:
    """Table 2 or 3."""
    table = Table(
        f"Table {net.table}: {net.title}, beside the paper",
        "Act% is the share of a layer's outputs that are not zero, after pooling: so counted, the paper's own "
        "totals come out. FLOP% is Weights% times Act% of the layer before. Mean ± standard deviation over "
        "the seeds; the paper's figure behind each.",
        [
            "layer",
            "weights",
            "paper",
            "FLOP",
            "paper",
            "Act%",
            "paper",
            "Weights%",
            "paper",
            "FLOP%",
            "paper",
        ],
    )
    papers = [*(layer.paper for layer in net.layers), net.total]
    for paper, rows in zip(
        papers, zip(*(m.rows for m in results.of(net.name)), strict=True), strict=True
    ):
        row = rows[0]
        table.rows.append(
            [
                row.name,
                size(row.weights),
                size(paper.weights),
                size(row.flop),
                size(paper.flop),
                percent((r.act for r in rows), "{:.1f}"),
                str(paper.act),
                percent((r.kept for r in rows), "{:.1f}"),
                str(paper.kept),
                percent((r.flop_kept for r in rows), "{:.1f}"),
                str(paper.flop_kept),
            ]
        )
    return table


def storage(results: Results) -> Table:
    table = Table(
        "On disk",
        "Seed 0, fp32, `save_relative`: values and gaps of 5 bits in dense layers, of 8 in convolutions, as the "
        "paper counts. A filler is a zero that bridges a gap too large for its bits. Each file was read "
        "back and erred on the same number of images.",
        ["net", "tensor", "dense bytes", "values", "gaps", "fillers", "stored bytes", "rate"],
    )
    for name, net in NETS.items():
        m = results.of(name)[0]
        for t in m.storage:
            fillers = f"{t.entries - t.kept:,}" if t.index_bytes else ""
            row = [
                t.name,
                f"{t.dense_bytes:,}",
                f"{t.value_bytes:,}",
                f"{t.index_bytes:,}",
                fillers,
            ]
            table.rows.append([net.title, *row, f"{t.bytes:,}", f"{t.rate:.1f}x"])
        dense = sum(t.dense_bytes for t in m.storage)
        index = sum(t.index_bytes for t in m.storage)
        values = sum(t.value_bytes for t in m.storage)
        row = ["**file**", f"{dense:,}", f"{values:,}", f"{index:,}", ""]
        table.rows.append([net.title, *row, f"{m.file_bytes:,}", f"{dense / m.file_bytes:.1f}x"])
    return table


def dead(results: Results) -> Table:
    table = Table(
        "Dead neurons",
        "Those without a weight into them or out of them, taken out of the retrained net; the error of the "
        "smaller dense net is again over all test images.",
        ["net", "seed", "neurons", "taken out", "parameters", "left", "error", "error after"],
    )
    for m in results.measured:
        counts = [f"{n:,}" for n in (m.neurons, m.dead, m.parameters, m.smaller)]
        ends = [percent([m.after]), percent([m.smaller_error])]
        table.rows.append([NETS[m.net].title, str(m.seed), *counts, *ends])
    return table


def curves(results: Results) -> Table:
    densities = [pruned for pruned, _ in next(iter(results.curves.values()))]
    baseline = ", ".join(f"{label} {100 * value:.2f}" for label, value in results.dense.items())
    table = Table(
        "Figure 5 in numbers",
        f"Error in percent of LeNet-300-100 by the share of weights pruned away. {baseline}. Seed 0, one "
        "training a point.",
        ["", *(f"{100 * d:.1f}%" for d in densities)],
    )
    for label, points in results.curves.items():
        table.rows.append([label, *(f"{100 * e:.2f}" for _, e in points)])
    return table


def sensitivity(results: Results) -> Table:
    table = Table(
        "Figure 6 in numbers",
        "Error in percent with one layer pruned to the density above and nothing retrained. Seed 0.",
        ["net", "layer", *(f"{d:g}" for d in results.densities)],
    )
    for name, by_layer in results.sensitivity.items():
        for layer, values in by_layer.items():
            table.rows.append([NETS[name].title, layer, *(f"{100 * v:.2f}" for v in values)])
    return table


def against_the_paper(results: Results) -> list[str]:
    """What each claim came to; every word that depends on a number is chosen by it."""
    lines = []
    for name, net in NETS.items():
        found = results.of(name)
        before, after = (
            [100 * v for v in vs] for vs in zip(*((m.before, m.after) for m in found), strict=True)
        )
        change = fmean(after) - fmean(before)
        noise = (stdev(before) ** 2 + stdev(after) ** 2) ** 0.5 if len(found) > 1 else 0.0
        word = (
            "within the spread of the seeds"
            if abs(change) <= noise
            else "more than the spread of the seeds"
        )
        lines.append(
            f"**{net.title}**: {min(m.rate for m in found):.1f}x fewer parameters, error {spread(before)} to "
            f"{spread(after)}: {change:+.2f}, {word}, {noise:.2f}. The paper: 12x, {net.before:.2f} to {net.after:.2f}."
        )
    middle, outer = results.bands
    lines.append(
        f"**Figure 4.** Of fc1's weights {100 * middle:.1f}% are left in the middle half of each image row and "
        f"{100 * outer:.1f}% in the outer half: the 28 bands."
    )
    lines += _regularisation(results)
    for name, by_layer in results.sensitivity.items():
        at = min(range(len(results.densities)), key=lambda i: abs(results.densities[i] - 0.2))
        worst = max(by_layer, key=lambda layer: by_layer[layer][at])
        lines.append(
            f"**Sensitivity.** At a density of {results.densities[at]:g} {NETS[name].title} suffers most from "
            f"`{worst}`, {100 * by_layer[worst][at]:.2f}. In the paper, of AlexNet, it is the first convolution."
        )
    return lines


def _regularisation(results: Results) -> list[str]:
    """L1 against L2, where the paper finds the one better before retraining and the other after it."""
    lines = []
    for when in ("no retraining", "retrained"):
        l1, l2 = (results.curves[f"{p}, {when}"] for p in ("L1", "L2"))
        wins = sum(a < b for (_, a), (_, b) in zip(l1, l2, strict=True))
        claim = (
            "L1 is better before retraining" if when == "no retraining" else "L2 is better after it"
        )
        lines.append(
            f"**Figure 5, {when}.** L1 has the lower error at {wins} of {len(l1)} densities. The paper: {claim}."
        )
    at_once, rounds = (
        results.curves["L2, retrained"],
        results.curves["L2, pruned and retrained in rounds"],
    )
    share, one, many = at_once[-1][0], at_once[-1][1], rounds[-1][1]
    lines.append(
        f"**Rounds.** At {100 * share:.1f}% pruned, in rounds {100 * many:.2f}, at once {100 * one:.2f}; each "
        "round retrains, so that the rounds have had more epochs by then."
    )
    return lines


def head(results: Results) -> str:
    f = results.facts
    lines = [
        f"# {f['date']}, pruning LeNets as Han et al. 2015",
        f"{output.origin(f)}, seeds 0 to {f['seeds'] - 1}, {f['data']}. Sums in another order change the "
        "errors by a few images.",
        'Anchor: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626).',
        *(
            f"{net.title}: SGD of momentum 0.9, batch 128, each stage at a rate that falls linearly to 0; densities "
            f"{', '.join(f'{layer.name} {layer.density:g}' for layer in net.layers)}, in {ROUNDS} rounds that each "
            f"keep the same share."
            for net in NETS.values()
        ),
    ]
    if f["quick"]:
        lines.append(
            "**Quick**: 1000 images and one epoch. The form is right, the numbers mean nothing."
        )
    return "\n\n".join(lines) + "\n"


def tables(results: Results) -> list[Table]:
    found = [errors(results)]
    for net in NETS.values():
        found += [layers(results, net), rounds(results, net)]
    return [*found, storage(results), dead(results), curves(results), sensitivity(results)]


def markdown(results: Results, stem: str) -> str:
    lines = "\n".join(f"* {line}" for line in against_the_paper(results))
    pictures = "\n\n".join(f"![{n}]({stem}-{n}.png)" for n in ("mask", "curves", "sensitivity"))
    found = [table.markdown() for table in tables(results)]
    return "\n".join([head(results), f"## Against the paper\n\n{lines}\n", pictures + "\n", *found])
