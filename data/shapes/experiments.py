"""
The paper's experiments in miniature: what happens when one turns VLV's knobs, and what its embedding knows.

    pip install matplotlib
    python data/shapes/experiments.py                    # all eight, about four hours on two cores
    python data/shapes/experiments.py guidance mixing    # some; the last four use a checkpoint, for minutes

    queries     how many queries: 1 to as many as CLIP has positions                      trains
    parts       what stage 2 trains: the MLP, the LLM, BART with and without denoising    trains
    data        how many images in stage 1, how many captions in stage 2                  trains
    llm         how large a language model                                                trains
    guidance    classifier-free guidance 1 to 4
    words       what the embedding knows beyond words, drawn and by a linear probe
    mixing      some queries of one image, the rest of another
    knowledge   what each query knows, and where it looks

writes experiments.json and pictures into data/shapes/experiments/. The training runs, in out/experiments/,
are ordinary runs of train.py, as many at a time as there are cores; a killed call goes on by the same
command. Figures are means over three seeds of training with their standard deviation, or over scenes with the
standard error of a bootstrap.
"""

import importlib.util
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import prepare
import torch
from evaluate import images_of, judge, parse, see, summarize
from PIL import Image, ImageDraw, ImageFont
from prepare import RESOLUTION, SPLITS, describe, scenes, validation_captions
from tqdm import tqdm

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))
from data import latents
from data.distributed import quiet
from data.results import checkpoint_fingerprint, find_checkpoint, panel
from data.settings import read_json, read_settings, write_json, write_atomically
from vlv import VLV, VLVConfig

CONFIG = HERE / "config.json"
RUNS = REPOSITORY / "out" / "experiments"
# of 32 images. Short: until a setting of stage 1 shows. Long: as in the main README; what stage 2 is asked
# starts from there, as there is something to caption from
STEPS = {"stage 1, short": 900, "stage 1, long": 1800, "stage 2": 400}
SEEDS = (0, 1, 2)
QUERIES = (1, 2, 4, 8, 16, 40)  # the toy's CLIP has 40 positions
AMOUNTS = (1_000, 3_000, 10_000, 30_000)
WITHOUT_STAGE_1 = (1_000, 30_000)  # the ends alone: such a run takes five times as long
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0)
LLMS = {"small": (64, 2), "medium": (128, 4), "large": (256, 6)}  # width, layers; medium is the bundled one
PARTS = {
    "MLP": ["--stage2_trains", "mlp"],
    "MLP, LLM": ["--stage2_trains", "mlp", "llm"],
    "MLP, LLM, BART": [],
    "MLP, LLM, BART, no denoising": ["--no-stage2_denoises"],
}
# of work on two cores
MINUTES = dict(queries=80, parts=40, data=95, llm=20, guidance=2, words=3, mixing=2, knowledge=10)
SCENES = 200  # of validation, that are drawn to measure something


# --- figures ----------------------------------------------------------------------------------------------


def over(varied: str, measures: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {label: (varied, measure) for label, measure in measures.items()}


ATTRIBUTES = {"colour": "color", "shape": "shape", "size": "size", "place": "place"}
CAPTIONS = {"attributes right": "attributes", "exactly right": "exact"}
OF_MIXED = ("background of A", "background of B", "objects of A", "objects of B")
FIRST, WITHOUT = "from the first queries: ", "without one query: "
# The panels of an experiment's figure: (title, label of x, {label: (what is varied, what is measured)}). Of
# rows that have a "from", a line shows those with its label.
FIGURES = {
    "queries": [
        ("denoising loss", "queries", over("queries", {"embedding": "denoising_loss"})),
        ("PSNR, dB", "queries", over("queries", {"redrawn": "psnr"})),
        ("offset, pixels", "queries", over("queries", {"redrawn": "offset"})),
        ("rightly drawn", "queries", over("queries", ATTRIBUTES)),
        ("captions", "queries", over("queries", CAPTIONS)),
    ],
    "data": [
        ("stage 1: denoising loss", "images", over("images in stage 1", {"embedding": "denoising_loss"})),
        ("stage 1: PSNR, dB", "images", over("images in stage 1", {"redrawn": "psnr"})),
        ("stage 2: captions", "captions", {
            f"{label}, {how} stage 1": (f"captions {how} stage 1", measure)
            for how in ("after", "without") for label, measure in CAPTIONS.items()}),
    ],
    "guidance": [
        ("PSNR, dB", "guidance", over("guidance", {"embedding": "psnr", "caption": "psnr"})),
        ("nothing wrong", "guidance", over("guidance", {"embedding": "perfect", "caption": "perfect"})),
        ("offset, pixels", "guidance", over("guidance", {"embedding": "offset", "caption": "offset"})),
    ],
    "mixing": [
        ("drawn", "queries taken from A", over("queries of A", {n: f"{n} drawn" for n in OF_MIXED})),
        ("captioned", "queries taken from A", over("queries of A", {n: f"{n} said" for n in OF_MIXED})),
    ],
    "knowledge": [
        (FIRST + "PSNR, dB", "queries", over("first queries", {"redrawn": "psnr"})),
        (FIRST + "rightly drawn", "queries", over("first queries", {"found": "found"} | ATTRIBUTES)),
        (WITHOUT + "PSNR, dB", "left out", over("without query", {"redrawn": "psnr"})),
        (WITHOUT + "rightly drawn", "left out", over("without query", {"found": "found"} | ATTRIBUTES)),
    ],
}
TICKS = {"queries": QUERIES, "data": AMOUNTS, "guidance": GUIDANCES}


def draw_figure(experiment: str, rows: list[dict]) -> Image.Image:
    from matplotlib.figure import Figure

    panels, file = FIGURES[experiment], io.BytesIO()
    columns = 3 if len(panels) % 2 else 2
    height = -(-len(panels) // columns)
    figure = Figure((4.2 * columns, 3.4 * height), dpi=200, layout="constrained")
    for number, (title, x_label, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(height, columns, number, title=title, xlabel=x_label)
        for label, (varied, measure) in lines.items():
            points = [(row[varied], *row[measure]) for row in rows
                      if varied in row and measure in row and row.get("from", label) == label]
            axes.errorbar(*np.reshape(points, (-1, 3)).T, marker="o", markersize=3, capsize=2, label=label)
        if experiment in TICKS:
            axes.set_xscale("linear" if experiment == "guidance" else "log")
            axes.set_xticks(TICKS[experiment], [f"{tick:,g}" for tick in TICKS[experiment]])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small", frameon=False)
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB").quantize()


# --- training runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of one stage, and how its checkpoint measures. after: the run of stage 1 that it starts from;
    None in stage 2: the pretrained models."""

    seed: int
    queries: int = QUERIES[-1]
    images: int = 30_000
    length: str = "short"  # of stage 1
    stage: int = 1
    after: "Run | None" = None
    parts: str = "MLP, LLM, BART"
    llm: str = "medium"

    @property
    def folder(self) -> Path:
        """Its name says what it is."""
        if self.stage == 1:
            return RUNS / f"{self.length}-{self.queries}-queries-{self.images}-images-seed-{self.seed}"
        base = self.after.folder if self.after else RUNS / f"no-stage-1-seed-{self.seed}"
        name = f"{self.images}-captions-{self.parts}-{self.llm}-llm"
        return base / name.replace(", ", "-").replace(" ", "-")

    def flags(self) -> list:
        flags = ["--num_queries", self.queries]
        if self.llm != "medium":
            flags += ["--llm", RUNS / "models" / self.llm]
        if self.stage == 1:
            return [*flags, "--max_steps", STEPS[f"stage 1, {self.length}"]]
        if self.after:
            flags += ["--max_steps", STEPS["stage 2"], "--init_from", self.after.folder / "stage1"]
            return [*flags, *PARTS[self.parts]]
        # as many steps as both stages have, on captions alone, and everything of it learns
        flags += ["--max_steps", STEPS["stage 1, long"] + STEPS["stage 2"], "--init_from", RUNS / "untrained"]
        everything = ["bart", "queries", "projection", "mlp", "llm"]
        return [*flags, "--no-stage2_denoises", "--stage2_trains", *everything]

    def commands(self) -> list[list[str]]:
        """What trains it, and what measures it then."""
        data, checkpoint = RUNS / "data" / str(self.images) / "train", self.folder / f"stage{self.stage}"
        train = [REPOSITORY / "train.py", "--stage", self.stage, "--config", CONFIG, "--data", data,
                 "--val_data", "", "--out_dir", self.folder, "--seed", self.seed, "--latents", "--resume",
                 "--device", "cpu"]
        measure = [HERE / "evaluate.py", "--ckpt", checkpoint, "--images", SCENES, "--rows", "embedding",
                   "--num_beams", 1, "--json", self.folder / "measured.json"]
        return [[str(part) for part in command] for command in (train + self.flags(), measure)]

    def train_and_measure(self) -> None:
        """Does what is left of it, in processes of one thread. Raises RuntimeError, with the log's name, if
        that fails."""
        result = self.folder / "result.json"
        if result.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.folder / "log.txt", "a") as log:
            for command in self.commands():
                how = dict(cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
                if subprocess.run([sys.executable, *command], **how).returncode:
                    raise RuntimeError(f"{command[0]} failed: see {self.folder / 'log.txt'}")
        os.replace(self.folder / "measured.json", result)

    def result(self) -> dict:
        """{"denoising_loss", "psnr", "offset", ..., and in stage 2 "exact", "attributes"}"""
        measured = read_json(self.folder / "result.json")
        captions = measured.get("captions", {})
        return {"denoising_loss": measured["denoising_loss"]["embedding"], **measured["embedding"],
                **{name: captions[name] for name in ("exact", "attributes") if captions}}


def captioner(stage1: Run, **kwargs) -> Run:
    return Run(stage1.seed, stage=2, after=stage1, queries=stage1.queries, **kwargs)


def runs_of(experiment: str) -> list[tuple[dict, list[Run]]]:
    """The lines of an experiment: what is varied, and its runs, one a seed."""
    long = [Run(s, length="long") for s in SEEDS]
    if experiment == "queries":
        return [({"queries": n}, [captioner(Run(s, queries=n)) for s in SEEDS]) for n in QUERIES]
    if experiment == "parts":
        lines = [({"trained": parts}, [captioner(run, parts=parts) for run in long]) for parts in PARTS]
        return [({"trained": "after stage 1"}, long), *lines]
    if experiment == "llm":
        return [({"llm": llm}, [captioner(run, llm=llm) for run in long]) for llm in LLMS]
    lines = [({"images in stage 1": n}, [Run(s, images=n) for s in SEEDS]) for n in AMOUNTS]
    lines += [({"captions after stage 1": n}, [captioner(run, images=n) for run in long]) for n in AMOUNTS]
    alone = [(n, [Run(s, stage=2, images=n) for s in SEEDS]) for n in WITHOUT_STAGE_1]
    return lines + [({"captions without stage 1": n}, runs) for n, runs in alone]


def prepare_runs(runs: list[Run]) -> None:
    """Makes what they start from: data with latents, an untrained checkpoint, other language models."""
    settings = read_json(CONFIG)
    for images in sorted({run.images for run in runs}):
        folder = RUNS / "data" / str(images)
        if not (folder / "complete").exists():
            prepare.main(["--out", str(folder), "--train", str(images)])
            latents.main([str(folder / "train"), "--image_size", str(RESOLUTION), "--num_workers", "0",
                          "--diffusion_model", settings["diffusion_model"]])
            (folder / "complete").touch()
    if any(run.stage == 2 and not run.after for run in runs) and not (RUNS / "untrained").exists():
        torch.manual_seed(0)
        fields = {name: value for name, value in settings.items() if name in VLVConfig.__dataclass_fields__}
        VLV.from_pretrained(None, **fields).save_pretrained(RUNS / "untrained")
    for llm in sorted({run.llm for run in runs} - {"medium"}):
        folder = RUNS / "models" / llm
        if not folder.exists():
            from pretrain import PretrainConfig, save, train_qwen

            how = PretrainConfig()  # the medium one's
            drawn = scenes("pretrain", how.scenes, how.seed, exclude=validation_captions())
            torch.manual_seed(how.seed)
            folder.parent.mkdir(parents=True, exist_ok=True)
            save(folder, *train_qwen([describe(scene) for scene in drawn], how.qwen_steps, *LLMS[llm]))


def all_runs(experiments: list[str]) -> list[Run]:
    """Each run that the experiments need, once, after the one that it starts from."""
    runs = [run for experiment in experiments for _, line in runs_of(experiment) for run in line]
    return list(dict.fromkeys([run.after for run in runs if run.after] + runs))


def train_all(experiments: list[str], processes: int) -> None:
    """All runs of the experiments, `processes` at a time."""
    runs = all_runs(experiments)
    left = [run for run in runs if not (run.folder / "result.json").exists()]
    if not left:
        return
    with chdir(REPOSITORY):  # where the models' names are relative to
        prepare_runs(left)
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit=" runs", smoothing=0)
    for stage in (1, 2):  # one starts from the other
        with ThreadPoolExecutor(processes) as pool:
            for _ in pool.map(Run.train_and_measure, [run for run in left if run.stage == stage]):
                bar.update()
    bar.close()


def over_seeds(experiment: str) -> list[dict]:
    """A row each line: what is varied, and (mean, standard deviation over seeds) of each measure."""
    rows = []
    for row, line in runs_of(experiment):
        results = [run.result() for run in line]
        for name in results[0]:
            values = [result[name] for result in results]
            row[name] = [float(np.mean(values)), float(np.std(values, ddof=1))]
        rows.append(row)
    return rows


# --- a checkpoint -----------------------------------------------------------------------------------------


def bootstrap(items: list, summary, repeats: int = 200) -> dict[str, list[float]]:
    """{name: [value, standard error]} of summary(items), a dict, the error over resampled items."""
    rng, result = np.random.default_rng(0), {}
    again = [summary([items[i] for i in rng.integers(len(items), size=len(items))]) for _ in range(repeats)]
    for name, value in summary(items).items():
        if np.isfinite(value):  # nothing found has no offset
            result[name] = [float(value), float(np.nanstd([a[name] for a in again], ddof=1))]
    return result


class Subject:
    """The checkpoint that is looked at, on held-out scenes."""

    def __init__(self, ckpt: str, count: int):
        self.folder, self.count = find_checkpoint(ckpt), count
        self.truths = list(scenes("val", count))
        self.texts = [describe(truth) for truth in self.truths]

    @cached_property
    def model(self) -> VLV:
        return VLV.from_pretrained(self.folder)

    @cached_property
    def originals(self) -> torch.Tensor:
        return images_of(self.truths)

    @cached_property
    def token_embeds(self) -> torch.Tensor:
        """ẑ, (count, N, D)"""
        return torch.cat([self.model.encoder(batch) for batch in self.originals.split(50)])

    @cached_property
    def prompt_embeds(self) -> torch.Tensor:
        """c, (count, N, D)"""
        return self.model.decoder.encode_text(self.token_embeds)

    @cached_property
    def padding(self) -> torch.Tensor:
        """(D,): the token embedding with which CLIP pads a prompt; it replaces a query that is taken away."""
        tokens = self.model.decoder.pipeline.tokenizer
        return self.model.decoder.text_encoder.get_input_embeddings().weight[tokens.pad_token_id]

    def redraw(self, prompt, guidance_scale: float = 2.0) -> list:
        """Pictures of c, (B, N, D), or of B texts."""
        pictures, reconstruct = [], self.model.decoder.reconstruct
        for at in tqdm(range(0, len(prompt), 50), desc="drawing", leave=False):
            pictures += reconstruct(prompt[at : at + 50], 25, guidance_scale)
        return pictures

    def redraw_tokens(self, token_embeds: torch.Tensor) -> list:
        return self.redraw(self.model.decoder.encode_text(token_embeds))

    def judge(self, pictures: list) -> dict[str, list[float]]:
        return bootstrap([judge(truth, picture) for truth, picture in zip(self.truths, pictures)], summarize)


def guidance(subject: Subject) -> tuple[list[dict], dict]:
    rows = []
    for scale in GUIDANCES:
        for name, prompt in [("embedding", subject.prompt_embeds), ("caption", subject.texts)]:
            rows.append({"from": name, "guidance": scale, **subject.judge(subject.redraw(prompt, scale))})
    return rows, {}


def words(subject: Subject) -> tuple[list[dict], dict]:
    """Offset and error of the half width, in pixels: of what is drawn; of the best guess that words allow;
    and of a linear regression (ridge) on c, the embedding's or the true caption's."""
    truths, many = subject.truths, list(scenes("train", 8_000, exclude=validation_captions()))
    rows = []
    for name, prompt in [("embedding", subject.prompt_embeds), ("true caption", subject.texts)]:
        judged = subject.judge(subject.redraw(prompt))
        errors = {measure: judged[measure] for measure in ("offset", "size_error")}
        rows.append({"from": f"drawn from the {name}"} | errors)
    same_words = {}  # (x, y, r) of the objects that the same words describe
    for _, o, numbers in objects_of(many):
        same_words.setdefault((o["place"], o["size"]), []).append(numbers)
    guesses = [np.mean(same_words[o["place"], o["size"]], 0) for _, o, _ in objects_of(truths)]
    rows.append({"from": "the best that words allow"} | guess_errors(truths, guesses))
    for name, features_of in [("embedding", embedding_features), ("true caption's c", caption_features)]:
        guesses = probe(features_of(subject, many), many, features_of(subject, truths), truths)
        rows.append({"from": f"linear probe of the {name}"} | guess_errors(truths, guesses))
    return rows, {}


def objects_of(truths: list[dict]) -> list[tuple[int, dict, tuple]]:
    """(number of the scene, object, (x, y, r)) of each object."""
    return [(i, o, (o["x"], o["y"], o["r"])) for i, truth in enumerate(truths) for o in truth["objects"]]


def guess_errors(truths: list[dict], guesses: list[np.ndarray]) -> dict[str, list[float]]:
    """guesses: (x, y, r) of each object."""
    differences = np.array(guesses) - [numbers for _, _, numbers in objects_of(truths)]
    errors = [(np.hypot(x, y), abs(r)) for x, y, r in differences]
    return bootstrap(errors, lambda pairs: dict(zip(("offset", "size_error"), np.mean(pairs, 0))))


def embedding_features(subject: Subject, truths: list[dict]) -> np.ndarray:
    """c of the pictures, (n, N D)."""
    parts = [subject.model.embed(batch).flatten(1) for batch in images_of(truths).split(50)]
    return torch.cat(parts).double().numpy()


def caption_features(subject: Subject, truths: list[dict]) -> np.ndarray:
    """c of the true captions, (n, N D)."""
    texts, encode = [describe(truth) for truth in truths], subject.model.decoder.encode_prompt
    parts = [encode(texts[at : at + 50]).flatten(1) for at in range(0, len(texts), 50)]
    return torch.cat(parts).double().numpy()


def probe(features: np.ndarray, truths: list[dict], other_features: np.ndarray, others: list[dict]) -> list:
    """Learns (x, y, r) of objects from features of their scenes, by a linear regression for each place.
    Returns what it guesses for the objects of other scenes."""
    probes = {}
    for place in {o["place"] for _, o, _ in objects_of(truths)}:
        targets = {i: numbers for i, o, numbers in objects_of(truths) if o["place"] == place}
        probes[place] = Ridge()
        probes[place].fit(features[[*targets]], np.array([*targets.values()]))
    return [probes[o["place"]].predict(other_features[i]) for i, o, _ in objects_of(others)]


class Ridge:
    """Linear regression with a penalty, which a fifth of the samples chooses; the others are fitted."""

    def fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self.mean, self.offset = features.mean(0), targets.mean(0)
        x, y = features - self.mean, targets - self.offset
        held = len(x) // 5
        kernel = x[held:] @ x[held:].T  # in the dual: there are fewer samples than features
        best = None
        for penalty in np.trace(kernel) / len(kernel) * 10.0 ** np.arange(-6, 1):
            weights = x[held:].T @ np.linalg.solve(kernel + penalty * np.eye(len(kernel)), y[held:])
            error = np.square(x[:held] @ weights - y[:held]).mean()
            if best is None or error < best[0]:
                best = error, weights
        self.weights = best[1]

    def predict(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) @ self.weights + self.offset


def shares(pair: list[dict], found: dict, way: str) -> dict[str, list[bool]]:
    """Whether the background of a picture or caption is A's or B's, and which of their objects, by colour and
    place, are there. way: drawn or said."""
    there, result = {(o["color"], o["place"]) for o in found["objects"]}, {}
    for name, scene in zip("AB", pair):
        result[f"background of {name} {way}"] = [found["background"] == scene["background"]]
        result[f"objects of {name} {way}"] = [(o["color"], o["place"]) in there for o in scene["objects"]]
    return result


def summarize_mix(items: list[dict]) -> dict[str, float]:
    return {name: float(np.mean([value for item in items for value in item[name]])) for name in items[0]}


def mixing(subject: Subject) -> tuple[list[dict], dict]:
    """The first queries of A, the rest of B: pairs of scenes with other backgrounds and no place in
    common."""
    truths, embeds, pairs = subject.truths, subject.token_embeds, []
    places = [{o["place"] for o in truth["objects"]} for truth in truths]
    for a in range(subject.count):
        others = [b for b in range(a + 1, subject.count) if not places[a] & places[b]]
        others = [b for b in others if truths[a]["background"] != truths[b]["background"]]
        pairs += [(a, b) for b in others[:1]]
    pairs, number = pairs[: subject.count // 2], embeds.shape[1]
    splits = sorted({round(number * part / 8) for part in range(9)})
    rows, drawn, captions, items = [], {}, {}, {}
    for split in splits:
        mixed = torch.stack([torch.cat([embeds[a, :split], embeds[b, split:]]) for a, b in pairs])
        prompt_embeds = subject.model.decoder.encode_text(mixed)
        drawn[split] = subject.redraw(prompt_embeds)
        captions[split] = subject.model.caption_head.generate(prompt_embeds, num_beams=1)
        items[split] = []
        for pair, picture, caption in zip(pairs, drawn[split], captions[split]):
            pair = [truths[scene] for scene in pair]
            items[split].append(shares(pair, see(picture), "drawn") | shares(pair, parse(caption), "said"))
        rows.append({"queries of A": split, **bootstrap(items[split], summarize_mix)})
    middle = min(splits, key=lambda split: abs(split - number / 2))
    quality = [np.mean(item["objects of A drawn"] + item["objects of B drawn"]) for item in items[middle]]
    order = sorted(range(len(pairs)), key=lambda i: -quality[i])
    shown = order[:3] + order[len(order) // 2 - 1 : len(order) // 2 + 2]  # the best and the typical
    columns = [splits[3 * len(splits) // 4], middle, splits[len(splits) // 4]]
    pictures = []
    for i in shown:
        a, b = (subject.originals[scene] for scene in pairs[i])
        pictures.append([a, *(drawn[split][i] for split in columns), b])
    return rows, {"mixing-examples.png": panel(pictures, [captions[middle][i] for i in shown])}


def knowledge(subject: Subject) -> tuple[list[dict], dict]:
    number, rows, without = subject.token_embeds.shape[1], [], []
    for count in sorted({*range(5), *range(0, number + 1, max(1, number // 10)), number}):
        tokens = subject.token_embeds.clone()
        tokens[:, count:] = subject.padding
        rows.append({"first queries": count, **subject.judge(subject.redraw_tokens(tokens))})
    for query in range(number):
        tokens = subject.token_embeds.clone()
        tokens[:, query] = subject.padding
        without.append(subject.redraw_tokens(tokens))
        rows.append({"without query": query + 1, **subject.judge(without[-1])})
    return rows, {"attention.png": attention_sheet(subject, without)}


def cross_attention(subject: Subject, images: torch.Tensor) -> torch.Tensor:
    """Where each query looks: (B, N, 8, 8), the decoder's cross-attention to the image's tokens, the mean
    over layers and heads."""
    bart, seen = subject.model.encoder.bart["decoder"], []
    bart.set_attn_implementation("eager")  # the one that returns its weights
    note = lambda module, inputs, outputs: seen.append(outputs[1])
    hooks = [layer.encoder_attn.register_forward_hook(note) for layer in bart.layers]
    subject.model.encoder(images)
    for hook in hooks:
        hook.remove()
    bart.set_attn_implementation("sdpa")
    side = RESOLUTION // 4
    weights = torch.stack(seen).mean((0, 2))[:, :, 1 : 1 + side * side]  # the first is the others' mean
    return weights.unflatten(-1, (side, side))


def attention_sheet(subject: Subject, without: list[list], columns: int = 8) -> Image.Image:
    """Of one image: for each query where it looks, over what is drawn without it."""
    scene = next((i for i, truth in enumerate(subject.truths) if len(truth["objects"]) == 3), 0)
    weights = cross_attention(subject, subject.originals[scene : scene + 1])  # (1, N, 8, 8)
    weights = weights / weights.amax((2, 3), keepdim=True)
    redrawn = subject.redraw_tokens(subject.token_embeds[scene : scene + 1])[0]
    original = Image.fromarray(subject.originals[scene].permute(1, 2, 0).numpy())
    cells = [("image", original, redrawn)]
    heats = torch.nn.functional.interpolate(weights, scale_factor=4, mode="bilinear")[0]
    for query, heat in enumerate(heats):
        light = np.asarray(original) * (0.25 + 0.75 * heat[..., None].numpy())
        light = Image.fromarray(light.round().astype(np.uint8))
        cells.append((f"query {query + 1}", light, without[query][scene]))
    side, gap, label, font = 96, 6, 24, ImageFont.load_default(16)
    high = label + 2 * (side + gap)
    sheet = Image.new("RGB", ((columns + 1) * (side + gap), -(-len(without) // columns) * high), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (name, above, below) in enumerate(cells):
        row, column = divmod(number - 1, columns) if number else (0, -1)  # the image has its own column
        left, top = (column + 1) * (side + gap), row * high
        drawing.text((left + side / 2, top + 2), name, "black", font, "ma")
        for picture, y in [(above, top + label), (below, top + label + side + gap)]:
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, y))
    return sheet


# --- all together -----------------------------------------------------------------------------------------

TRAINED = ("queries", "parts", "data", "llm")
LOOKED_AT = {"guidance": guidance, "words": words, "mixing": mixing, "knowledge": knowledge}


@dataclass
class ExperimentsConfig:
    experiments: tuple[Literal[tuple(MINUTES)], ...]  # none: all
    ckpt: str = str(HERE / "vlv")  # for the last four
    scenes: Annotated[int, 2, SPLITS["val"]] = SCENES  # that the last four look at
    processes: Annotated[int, 1, 1024] = os.cpu_count()  # training runs at a time
    out: Path = HERE / "experiments"


def table(rows: list[dict]) -> str:
    """As Markdown, a value with its error behind ±."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    show = lambda value: f"{value[0]:.3f} ± {value[1]:.3f}" if isinstance(value, list) else str(value)
    lines = [names, ["---"] * len(names)] + [[show(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv=None) -> None:
    quiet()
    args = read_settings(ExperimentsConfig, argv, __doc__)
    file = args.out / "experiments.json"
    chosen = list(dict.fromkeys(args.experiments or MINUTES))
    args.out.mkdir(parents=True, exist_ok=True)
    results = read_json(file) if file.exists() else {}
    subject = Subject(args.ckpt, args.scenes)
    trained_with = dict(steps=STEPS, seeds=list(SEEDS), scenes=SCENES)
    looked_at_with = dict(checkpoint=checkpoint_fingerprint(subject.folder), scenes=subject.count)
    made_with = {name: trained_with if name in TRAINED else looked_at_with for name in chosen}
    left = [name for name in chosen if results.get(name, {}).get("made_with") != made_with[name]]
    if not FIGURES.keys().isdisjoint(left) and importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: matplotlib is missing, install it with: pip install matplotlib")
    hours, minutes = divmod(sum(MINUTES[name] for name in left), 60)
    print(f"to do: {', '.join(left) or 'nothing'}; about {hours} h {minutes} min on two cores"
          f" (delete an entry of {file} to do it again)", flush=True)
    train_all([name for name in left if name in TRAINED], args.processes)
    for name in left:
        print(f"{name} ...", flush=True)
        if name in TRAINED:
            rows, pictures = over_seeds(name), {}
        else:
            with torch.inference_mode():
                rows, pictures = LOOKED_AT[name](subject)
        if name in FIGURES:
            pictures[f"{name}.png"] = draw_figure(name, rows)
        for picture, image in pictures.items():
            write_atomically(args.out / picture, lambda path: image.save(path, "png"))
        results[name] = {"made_with": made_with[name], "rows": rows}
        write_json(file, {key: results[key] for key in MINUTES if key in results})
    for name in chosen:
        print(f"\n{name}\n\n{table(results[name]['rows'])}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
