"""
Measures the GPU at hand with models of full size and random weights: nothing has to be downloaded.

    python data/speed.py                             # all rows, what matters first, for eight minutes
    python data/speed.py --rows stage1 captions      # some of them
    python data/speed.py --quick                     # with the toy's models, anywhere: that each row runs

A row is measured in a process of its own, printed, and added to speed.json. One that fails, or for which no
time is left, says so and what it had measured, and the others go on. Rates are of one GPU, dollars of the
paper's number of images. Of the compiled graphs one is a trial: with no others, all ran eagerly.
"""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

START = time.perf_counter()
import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train
from data.caption import CaptionConfig, Shard, caption_shard
from data.distributed import compile_if_possible, run_and_exit, select_device
from data.loader import SyntheticDataset, collate
from data.settings import add_to_tar, parse_with_file, read_settings, write_json
from vlv import VLV, Noise, select_dtype

TRAINING = {  # row: (stage, flags beside the paper's recipe)
    "authors": (1, "--precision fp32 --no-compile --gradient_checkpointing unet --batch_size 32"),
    "stage1": (1, "--batch_size 64"),
    "stage2": (2, "--batch_size 8"),
    "stage1-384-latents": (1, "--batch_size 64 --encoder_image_size 384 --latents"),
    "stage2-384": (2, "--batch_size 8 --encoder_image_size 384"),
    "stage1-384": (1, "--batch_size 64 --encoder_image_size 384"),
    "stage1-eager": (1, "--batch_size 64 --no-compile"),
    "stage2-eager": (2, "--batch_size 8 --no-compile"),
}
ROWS = ("authors", "stage1", "captions", "stage2", "stage1-384-latents", "parts", "profile", "stage2-384",
        "stage1-384", "stage1-eager", "stage2-eager")
UNITS = {"images_per_second": "images/s", "tflop_per_image": "TFLOP an image", "tflop_per_second": "TFLOP/s",
         "gigabytes": "GB", "seconds_to_first_step": "s to the first step", "gpu_hours": "GPU-hours",
         "compiled_graphs": "graphs compiled", "dollars": "dollars",
         "times_the_authors": "times the authors'"}


@dataclass
class SpeedConfig:
    rows: tuple[Literal[ROWS], ...] = ROWS
    quick: bool = False  # tiny models, few repetitions
    minutes: Annotated[float, 0.01, 10000] = 8.0  # for all rows together
    usd_per_gpu_hour: Annotated[float, 0, 1000] = 2.5
    out: Path = Path("speed.json")
    here: bool = False  # measure one row in this process, and print JSON as it grows: so are rows started


def train_arguments(stage: int, flags: str, quick: bool) -> list[str]:
    arguments = ["--stage", str(stage), "--random_init", *flags.split()]
    if quick:
        arguments += ["--config", str(ROOT / "data" / "shapes" / "config.json"), "--batch_size", "2"]
        arguments += ["--num_workers", "0", *["--encoder_image_size", "16"] * ("384" in flags)]
    return arguments


def train_config(stage: int, flags: str, quick: bool) -> train.TrainConfig:
    given = parse_with_file(train.TrainConfig, train_arguments(stage, flags, quick), "")
    return train.merge_settings(given, {}, 1)


def milliseconds(function, device: torch.device, times: int) -> float:
    """The median, after two calls in which kernels are compiled and chosen."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    durations = []
    for _ in range(2 + times):
        wait()
        start = time.perf_counter()
        function()
        wait()
        durations.append(1000 * (time.perf_counter() - start))
    return float(np.median(durations[2:]))


def measure_training(row: str, quick: bool, device: torch.device):
    """What train.py --benchmark measures; and how long its first step is waited for, imports included."""
    stage, flags = TRAINING[row]
    meter = train.run([*train_arguments(stage, flags, quick), "--benchmark", "1" if quick else "8"])
    first_step = time.perf_counter() - START - sum(seconds for seconds, _ in meter.steps[1:])
    rate = meter.speed(meter.warm_up)["images_per_second"]
    images = train.RECIPE[stage]["batch_size"] * train.RECIPE[stage]["max_steps"]
    yield {"images_per_second": rate, "tflop_per_image": meter.flops / 1e12,
           "tflop_per_second": rate * meter.flops / 1e12, "gigabytes": meter.peak() / 1e9,
           "seconds_to_first_step": first_step, "gpu_hours": images / rate / 3600}


def as_trained(stage: int, flags: str, quick: bool, device: torch.device) -> tuple:
    """(model, as train.py makes it; its settings; autocast in its precision)."""
    config, dtype = train_config(stage, flags, quick), select_dtype("auto", device)
    model = train.load_model(config, None, device, dtype)
    return model, config, train.make_autocast(device, dtype)


def measure_parts(row: str, quick: bool, device: torch.device):
    """Milliseconds of each part in stage 1, with 64 images; forward and backward where gradients pass."""
    model, config, autocast = as_trained(1, "--batch_size 64 --no-compile", quick, device)
    encoder, decoder, count = model.encoder, model.decoder, config.batch_size
    shape = (count, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    noise = Noise(*(x.to(device) for x in decoder.draw_noise(range(count))))
    with torch.no_grad(), autocast():
        moments, token_embeds = decoder.encode_image(images), encoder(images).float()
        prompt_embeds = decoder.encode_text(token_embeds).float().requires_grad_()
    token_embeds.requires_grad_()
    parts = {"davit": lambda: encoder.encode_image(images), "davit_and_bart": lambda: encoder(images),
             "clip": lambda: decoder.encode_text(token_embeds), "vae": lambda: decoder.encode_image(images),
             "unet": lambda: decoder.denoising_loss(images, prompt_embeds, noise, moments)}

    def run(part) -> None:
        with autocast():
            loss = part().float().sum()
        if loss.requires_grad:
            loss.backward()

    def measure_all() -> dict:
        times = 1 if quick else 5
        return {name: milliseconds(lambda: run(part), device, times) for name, part in parts.items()}

    found = {"eager": measure_all()}
    optimizer, params, _ = train.make_optimizer(model, config)
    step = lambda: (torch.nn.utils.clip_grad_norm_(params, 1.0), optimizer.step())
    found["eager"]["clip_and_adamw"] = milliseconds(step, device, 3)
    yield found
    for net in (decoder.vae, decoder.unet):
        net.to(memory_format=torch.channels_last)
    found["eager, channels_last"] = measure_all()
    yield found
    few, steps = prompt_embeds[:8].detach(), 2 if quick else 50
    drawing = milliseconds(lambda: decoder.reconstruct(few, steps), device, 1)
    found[f"seconds_to_redraw_an_image_in_{steps}_steps"] = drawing / 1000 / len(few)
    yield found
    if compile_if_possible(model, device):
        found["compiled, channels_last"] = measure_all()
        yield found


def generate(llm, prefix: torch.Tensor, tokens: int) -> torch.Tensor:
    """transformers' own greedy search."""
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    return llm.generate(inputs_embeds=prefix, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0)


def write_shard(path: Path, count: int) -> None:
    """A tar file with so many JPEGs of 384 x 384 pixels."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            picture, file = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8), BytesIO()
            Image.fromarray(picture).resize((384, 384)).save(file, "jpeg")
            add_to_tar(tar, f"{i:09}.jpg", file.getvalue())


@torch.inference_mode()
def measure_captions(row: str, quick: bool, device: torch.device):
    """Milliseconds a token of the LLM; captions a second, from tar to line, of 100 tokens each; a save."""
    config, dtype = train_config(2, "", quick), select_dtype("auto", device)
    model = VLV.from_pretrained(dtype=dtype, device=device, with_unet=False, **config.of_the_model())
    head, llm, found = model.caption_head, model.caption_head.llm, {}
    head.tokenizer.eos_token = head.tokenizer.decode(len(head.tokenizer) - 1)  # so no caption ends early
    source = torch.empty(10**6 if quick else 2 * 10**9, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bytes_a_ms = 2 * len(source) / milliseconds(lambda: target.copy_(source), device, 3)  # read and written
    found["ms_to_read_the_llm_once"] = sum(p.nbytes for p in llm.parameters()) / bytes_a_ms
    few, many, batches = (4, 8, (1, 2)) if quick else (20, 100, (1, 64, 256))
    ways = {"replayed": head.greedy_search, "generate": lambda *given: generate(llm, *given)}
    for batch in batches:
        c = torch.randn(batch, config.num_queries, model.decoder.embed_dim, device=device, dtype=dtype)
        prefix = head.mlp(c)
        for way, search in ways.items():
            short, long = (milliseconds(lambda: search(prefix, n), device, 1) for n in (few, many))
            found[f"ms_a_token_{way}_{batch}"] = (long - short) / (many - few)
            yield found
    compile_if_possible(model, device)
    with TemporaryDirectory() as folder:
        path, count = Path(folder, "00000.tar"), 4 if quick else 512
        write_shard(path, count)
        how = CaptionConfig((path,), max_new_tokens=many, batch_size=count // 2)
        for call in ("captions_per_second_while_compiling", "captions_per_second"):
            start = time.perf_counter()
            for _ in caption_shard(how, model, device, Shard(path, call, Path(folder))):
                pass
            found[call] = count / (time.perf_counter() - start)
            yield found
        start = time.perf_counter()
        model.save_pretrained(Path(folder, "saved"))
        found["seconds_to_save"] = time.perf_counter() - start
        found["gigabytes_saved"] = Path(folder, "saved", "model.safetensors").stat().st_size / 1e9
    yield found


def measure_profile(row: str, quick: bool, device: torch.device):
    """Milliseconds of a step of stage 2, and of the 15 kernels that take most of it."""
    model, config, autocast = as_trained(2, "--batch_size 8", quick, device)
    sample = SyntheticDataset(config.image_size, config.max_caption_tokens)[0]
    batch, is_gpu = collate([sample] * config.batch_size), device.type == "cuda"

    def step() -> None:
        with autocast():
            loss = train.loss_of(model, batch, device)
        loss.backward()

    found = {"step": milliseconds(step, device, 1)}
    yield found
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu) as profiler:
        step()
    spent = lambda event: (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1000
    kernels = [event for event in profiler.key_averages() if not is_gpu or event.device_type.name == "CUDA"]
    kernels.sort(key=spent, reverse=True)
    found |= {"in_kernels": sum(map(spent, kernels)), "launches": sum(event.count for event in kernels)}
    yield found | {f"{event.key[:90]} x {event.count}": spent(event) for event in kernels[:15]}


MEASURES = {"parts": measure_parts, "captions": measure_captions, "profile": measure_profile}


def measure(row: str, quick: bool):
    """What is found, as it grows."""
    for found in MEASURES.get(row, measure_training)(row, quick, select_device("auto")):
        yield found | {"compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def last_result(printed: str) -> dict:
    """What a row's process printed last; it may have been killed in the middle of a line."""
    whole = [line for line in printed.split("\n")[:-1] if line.startswith("{")]
    return json.loads(whole[-1]) if whole else {}


def describe(row: str, found: dict) -> str:
    if "gpu_hours" not in found:
        return f"{row}: {json.dumps(found, indent=1)}"
    return f"| {' | '.join([row, *(f'{found[n]:,.3g} {unit}' for n, unit in UNITS.items() if n in found)])} |"


def main(argv=None) -> int:
    args = read_settings(SpeedConfig, argv, __doc__)
    if args.here:
        for found in measure(args.rows[0], args.quick):
            print(json.dumps(found), flush=True)
        return 0
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    results, deadline = {"card": card, "torch": torch.__version__}, START + 60 * args.minutes
    print(f"{card}, torch {torch.__version__}", flush=True)
    for row in args.rows:
        command = [sys.executable, __file__, "--here", *["--quick"] * args.quick, "--rows", row]
        try:
            left = max(0.01, deadline - time.perf_counter())
            result = subprocess.run(command, capture_output=True, text=True, timeout=left)
            found = last_result(result.stdout)
            if result.returncode:
                found["failed"] = result.stderr[-500:]
        except subprocess.TimeoutExpired as stopped:
            found = last_result((stopped.stdout or b"").decode(errors="replace"))
            found["failed"] = f"no time was left: give it more --minutes, or --rows {row}"
        if "gpu_hours" in found:
            found["dollars"] = found["gpu_hours"] * args.usd_per_gpu_hour
            if "images_per_second" in results.get("authors", {}) and TRAINING[row][0] == 1:
                theirs = results["authors"]["images_per_second"]
                found["times_the_authors"] = found["images_per_second"] / theirs
        results[row] = found
        print(describe(row, found), flush=True)
        write_json(args.out, results)
    return int(any("failed" in results[row] for row in args.rows))


if __name__ == "__main__":
    run_and_exit(main, "stopped; speed.json has the rows that were done")
