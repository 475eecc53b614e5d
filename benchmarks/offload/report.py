"""What the measurements come to: the tables, and what they say about the paper's figures."""

from __future__ import annotations

from statistics import fmean

from benchmarks import output
from benchmarks.cpu.report import Table

from .predictions import MACHINES, MODERN, PAPER
from .results import MapBytes, Results, Trained, density, ratio, total

PAPER_MEAN, PAPER_MAX = 2.6, 13.8  # Rhu et al., abstract
PAPER_NETS = ("alexnet", "vgg16", "squeezenet")  # of those here
PAPER_GAIN = "32 % on average and 61 % at most (arXiv), 53 % and 79 % (HPCA 2018)"
FORMATS = {
    "ZVC": "zvc NCHW",
    "ZVC, NHWC": "zvc NHWC",
    "ZVC without offsets": "zvc, no offsets",
    "tokens": "tokens NCHW",
    "tokens, NHWC": "tokens NHWC",
    "fixed": "fixed NCHW",
    "fixed, NHWC": "fixed NHWC",
    "zlib": "zlib NCHW",
    "zlib, NHWC": "zlib NHWC",
    "ZVC in bf16": "zvc bf16",
}


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _x(value: float) -> str:
    return f"{value:.2f}"


def convolutional(results: Results) -> list[Trained]:
    return [t for t in results.trained.values() if t.is_convolutional]


def at_end(t: Trained) -> list[MapBytes]:
    return t.papers(t.records[-1].maps)


def over_training(t: Trained, form: str) -> float:
    """Bytes before over bytes after, of the paper's maps in all records together."""
    return ratio([m for r in t.records for m in t.papers(r.maps)], form)


def best(t: Trained) -> tuple[float, str, int]:
    """The largest ratio of a map in all records, its layer and its step."""
    return max((m.ratio("zvc NCHW"), m.layer, r.step) for r in t.records for m in t.papers(r.maps))


def full_size_ratio(results: Results, net: str) -> float | None:
    found = [p.ratio for p in results.predictions if (p.net, p.machine) == (net, PAPER.name)]
    return found[0] if found else None


# ---- tables ----


def _nets(results: Results) -> Table:
    words = (
        "Bytes before over bytes after, of all maps together that convolutions and pools read, save the image (in a "
        "transformer, that dense layers read), in fp32, at the last step; over training: all measured steps together. "
        "`tokens` and `fixed` are the two run-length formats that benchmarks/offload/codecs.py spells out; zlib is at "
        "level 6. What has no layout in its name is NCHW, for a transformer channels before tokens."
    )
    columns = ["net", "density, first to last", *FORMATS, "ZVC over training", "best map, ZVC"]
    table = Table("Ratio by format and layout", words, columns)
    for t in results.trained.values():
        first, last = t.papers(t.records[0].maps), at_end(t)
        value, layer, step = best(t)
        table.rows.append(
            [
                t.net,
                f"{_percent(density(first))} to {_percent(density(last))}",
                *(_x(ratio(last, form)) for form in FORMATS.values()),
                _x(over_training(t, "zvc NCHW")),
                f"{_x(value)} (`{layer}`, step {step})",
            ]
        )
    return table


def _training(results: Results) -> Table:
    words = (
        "Adam; the loss is that of the first and the mean of the last ten steps. Density of the same maps together, "
        "at each measured step."
    )
    columns = "net | data | size | batch | parameters | steps | loss | s | step: density"
    table = Table("Training", words, columns.split(" | "))
    for t in results.trained.values():
        seen = ", ".join(f"{r.step}: {_percent(density(t.papers(r.maps)))}" for r in t.records)
        table.rows.append(
            [
                t.net,
                t.data,
                str(t.size),
                str(t.batch),
                f"{t.parameters / 1e6:.2f} M",
                f"{len(t.losses)}" + ("" if t.complete else f" of {t.steps}"),
                f"{t.losses[0]:.2f} to {fmean(t.losses[-10:]):.2f}" if t.losses else "–",
                f"{t.seconds:.0f}",
                seen,
            ]
        )
    return table


def _layers(results: Results) -> Table:
    words = "Each map at the last step; density also at the first. Shapes are of the batch."
    columns = "net | input of | kind | shape | MiB | density, first | last | ZVC | tokens | NHWC | fixed | NHWC | "
    columns += "zlib | NHWC | ZVC in bf16"
    table = Table("Layer by layer", words, columns.split(" | "))
    for t in results.trained.values():
        first = {m.layer: m for m in t.records[0].maps}
        for m in t.records[-1].maps:
            forms = [f for name, f in FORMATS.items() if not name.startswith("ZVC")]
            table.rows.append(
                [
                    t.net,
                    f"`{m.layer}`",
                    m.kind,
                    " x ".join(map(str, m.shape)),
                    _mib(m.nbytes),
                    _percent(first[m.layer].density),
                    _percent(m.density),
                    _x(m.ratio("zvc NCHW")),
                    *(_x(m.ratio(form)) for form in forms),
                    _x(m.ratio("zvc bf16")),
                ]
            )
    return table


def _saved(results: Results) -> Table:
    words = (
        "Everything that autograd keeps for one step, the last, fp32: each storage once, parameters and buffers "
        "left out. `packed` counts a tensor each time a node saves it, parameters too. A storage that compression does "
        "not shrink stays raw; `narrow` also puts integers, which are the places of max-pools, into the narrowest "
        "type that holds them."
    )
    columns = "net | packed, MiB | kept once, MiB | of it shrinks | integers | ZVC | ZVC and narrow | in bf16"
    table = Table("All that training keeps", words, columns.split(" | "))
    for t in results.trained.values():
        saved, packed = t.records[-1].saved, t.records[-1].packed_bytes
        floats, integers = total(saved, "floats"), total(saved, "integers")
        zvc, narrow = total(saved, "floats_zvc"), total(saved, "integers_narrow")
        half = (floats / 2 + integers) / (total(saved, "floats_zvc_bf16") + narrow)
        kept = floats + integers
        table.rows.append(
            [
                t.net,
                _mib(packed),
                _mib(kept),
                _percent(total(saved, "shrunk") / kept),
                _percent(integers / kept),
                _x(kept / (zvc + integers)),
                _x(kept / (zvc + narrow)),
                _x(half),
            ]
        )
    return table


def _predicted(results: Results) -> Table:
    inputs = "; ".join(
        f"{m.name}: {m.flops / 1e12:g} TFLOP/s, {m.memory / 1e9:g} GB/s of memory, link {m.link / 1e9:g} GB/s, "
        f"compression {m.engine / 1e9:g} GB/s ({m.kind})"
        for m in MACHINES
    )
    words = (
        "Nets at the size of their publication, by the model in benchmarks/offload/virtualised.py: everything that "
        "autograd keeps moves, save integers and the last map, with the ratio that its layer had at the last step "
        "here. Losses are of the speed without offload; the speed-up is compressed over raw. MiB are of saved "
        "activations per image or sequence. That everything moves is vDNN's policy; one that moves what the link has "
        f"time for loses less. The rates are inputs, not claims: {inputs}."
    )
    columns = "net | machine | ratio | raw loses | compressed loses | speed-up | on the device: none, MiB | raw | "
    columns += "compressed | on the host: raw | compressed"
    table = Table("Predicted steps", words, columns.split(" | "))
    for p in results.predictions:
        table.rows.append(
            [
                p.net,
                p.machine,
                _x(p.ratio),
                _percent(p.loss_raw),
                _percent(p.loss_compressed),
                _x(p.speedup),
                *(_mib(b) for b in (*p.device_bytes, *p.host_bytes[1:])),
            ]
        )
    return table


def tables(results: Results) -> list[Table]:
    if not results.trained:
        return []
    made = [_nets, _training, _saved, _layers]
    if results.predictions:
        made.insert(3, _predicted)
    return [make(results) for make in made]


# ---- against the paper ----


def against_the_paper(results: Results) -> list[str]:
    """Our figures beside the paper's, then a line for each reason why they differ, as far as this run measured it."""
    nets, trained = convolutional(results), results.trained
    plain = [t for t in nets if t.net in PAPER_NETS]
    if not plain:
        return []
    names = ", ".join(t.net for t in plain)
    means = [fmean(ratio(at_end(t), "zvc NCHW") for t in plain)]
    means.append(fmean(over_training(t, "zvc NCHW") for t in plain))
    top = max((*best(t), t.net) for t in nets)
    lines = [
        f"The paper: {PAPER_MEAN} on average, {PAPER_MAX} at most. Here, of its nets {names}: "
        f"{_x(means[0])} on average at the last step, {_x(means[1])} over all measured steps; the best map of all "
        f"convolutional nets is {_x(top[0])} (`{top[1]}` of {top[3]}, step {top[2]})."
    ]
    full = [f for t in plain if (f := full_size_ratio(results, t.net))]
    if full:
        lines.append(
            "**Size.** With each layer weighted by its bytes at the size of publication, and all that autograd keeps "
            f"but integers, the image too: {_x(fmean(full))} on average."
        )
    lines += [
        line
        for reason in (
            _first_layers,
            _length,
            _data,
            _normalisation,
            _activations,
            _half,
            _layouts,
            _gain,
            _machines,
        )
        if (line := reason(results, plain, trained))
    ]
    return lines


def _first_layers(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for t in plain:
        image, maps = t.records[-1].maps[0], at_end(t)
        share = image.nbytes / (image.nbytes + sum(m.nbytes for m in maps))
        parts.append(
            f"{t.net} {_percent(share)} of the bytes, {_x(ratio([image, *maps], 'zvc NCHW'))} with it; the first map "
            f"after it {_x(maps[0].ratio('zvc NCHW'))}, the last {_x(maps[-1].ratio('zvc NCHW'))}"
        )
    return (
        f"**First layers.** The image has no zeros and is not in these figures: {'; '.join(parts)}."
    )


def _length(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for t in plain:
        values = (_x(ratio(t.papers(r.maps), "zvc NCHW")) for r in t.records)
        parts.append(f"{t.net} {', '.join(values)}")
    return (
        "**Length.** Zeros come with training, and these nets had minutes of it. "
        f"From one measured step to the next: {'; '.join(parts)}."
    )


def _data(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for t in plain:
        if t.photograph:
            digits, photograph = at_end(t), t.papers(t.photograph)
            zvc, zlib = (
                f"{_x(ratio(digits, form))} to {_x(ratio(photograph, form))}"
                for form in ("zvc NCHW", "zlib NCHW")
            )
            parts.append(f"{t.net} {zvc}, by zlib {zlib}")
    if not parts:
        return ""
    return (
        "**Data.** Digits are not photographs: their ground is one value, so that whole stretches of a map are equal, "
        f"zero or not, which zlib sees and ZVC does not. The same weights on {plain[0].data} and on parts of a "
        f"photograph: {'; '.join(parts)}."
    )


def _normalisation(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    if "resnet18" not in trained:
        return ""
    t = trained["resnet18"]
    maps = t.records[-1].maps
    inputs = [m for m in maps if m.kind == "norm"]
    share = sum(m.nbytes for m in inputs) / sum(m.nbytes for m in maps)
    return (
        f"**Batch normalisation.** {t.net}'s inputs of convolutions and pools reach "
        f"{_x(ratio(at_end(t), 'zvc NCHW'))}, but normalisation keeps its own inputs too: {_percent(share)} of the "
        f"bytes of all maps, at {_x(ratio(inputs, 'zvc NCHW'))}. All maps together: {_x(ratio(maps, 'zvc NCHW'))}."
    )


def _activations(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for name, t in trained.items():
        if not t.is_convolutional:
            fed = [m for m in t.records[-1].maps if m.layer.endswith(".down")]
            parts.append(
                f"{name.removeprefix('transformer-')} {_percent(density(fed))} dense, {_x(ratio(fed, 'zvc NCHW'))} "
                f"there and {_x(ratio(at_end(t), 'zvc NCHW'))} over all dense layers"
            )
    if not parts:
        return ""
    return (
        f"**Activation.** What the second dense layer of a feed-forward net reads: {'; '.join(parts)}. GELU has no "
        "zeros to leave out; the rest of a transformer has none either."
    )


def _half(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = [
        f"{t.net} {_x(ratio(at_end(t), 'zvc NCHW'))} to {_x(ratio(at_end(t), 'zvc bf16'))}"
        for t in plain
    ]
    return (
        f"**bf16.** The mask weighs twice as much beside 16-bit values: {'; '.join(parts)}. No density reaches more "
        "than 16, and 13.8 takes 1.0 % instead of the 4.1 % that it takes in fp32."
    )


def _layouts(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for name in ("ZVC", "tokens", "fixed", "zlib"):
        nchw, nhwc = FORMATS[name], FORMATS[name].replace("NCHW", "NHWC")
        parts.append(
            f"{name} {_x(fmean(ratio(at_end(t), nchw) for t in plain))} and "
            f"{_x(fmean(ratio(at_end(t), nhwc) for t in plain))}"
        )
    return f"**Layout.** Mean of these nets in NCHW and in NHWC: {'; '.join(parts)}."


def _gain(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    found = [p for p in results.predictions if p.machine == PAPER.name]
    found = [p for p in found if p.net in {t.net for t in plain}]
    if not found:
        return ""
    gains = ", ".join(f"{p.net} {_percent(p.speedup - 1)}" for p in found)
    losses = ", ".join(f"{p.net} {_percent(p.loss_raw)}" for p in found)
    return (
        f"**Speed.** The paper gains {PAPER_GAIN} over moving raw. The model, at rates like the paper's: {gains}; "
        f"{_percent(fmean(p.speedup for p in found) - 1)} on average. Moving raw costs it {losses}; vDNN measured 18 % "
        "for VGG-16 on a Titan X. The gain follows the rate of the products more than anything else, see the picture: "
        "the faster they are, the less they hide."
    )


def _machines(results: Results, plain: list[Trained], trained: dict[str, Trained]) -> str:
    parts = []
    for m in MODERN:
        found = [p for p in results.predictions if p.machine == m.name]
        if found:
            least, most = (f(found, key=lambda p: p.speedup) for f in (min, max))
            parts.append(
                f"{m.name} {_x(least.speedup)} ({least.net}) to {_x(most.speedup)} ({most.net})"
            )
    if not parts:
        return ""
    return (
        f"**Machines of today.** Compressed over raw: {'; '.join(parts)}. Below 1 the kernel costs more than the "
        "link, and only room on the host is gained."
    )


# ---- the whole ----


def head(results: Results) -> str:
    f = results.facts
    lines = [
        f"# {f['date']}, zero-value compression of activations while nets train",
        f"{output.origin(f)}, seed {f['seed']}. Ratios and densities do not depend on the machine's speed; "
        "sums in another order may change their last digits.",
        'Anchors: Rhu et al., "Compressing DMA Engine" (arXiv 1705.01626, HPCA 2018), and vDNN (arXiv 1602.08124).',
    ]
    if f["quick"]:
        lines.append(
            "**Quick**: thin nets and a few steps. The form is right, the numbers mean nothing."
        )
    if results.interrupted:
        lines.append(f"**Interrupted** after {results.interrupted}: what follows is what was done.")
    return "\n\n".join(lines) + "\n"


def markdown(results: Results, stem: str) -> str:
    parts = [head(results)]
    if lines := against_the_paper(results):
        parts.append("## Against the paper\n\n" + "\n".join(f"* {line}" for line in lines) + "\n")
    if results.trained:
        parts.append(f"![by layer and step]({stem}-layers.png)\n\n![by net]({stem}-nets.png)\n")
    return "\n".join(parts + [table.markdown() for table in tables(results)])
