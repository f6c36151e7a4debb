"""
Measures the GPUs at hand as train.py and data/caption.py use them: with train.py's flags, models of full
size, random weights and synthetic images. Nothing is downloaded.

    python data/speed.py --stage 1 --encoder_image_size 384 --latents
    torchrun --nproc_per_node=8 data/speed.py --stage 2          # captions, too
    python data/speed.py --stage 2 --config data/shapes/config.json --device cpu --micro_batch_size 2

Prints JSON. A step is a micro-batch on each GPU: nothing is accumulated. Rates are of all processes together,
hours and dollars of the paper's number of images.
"""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Florence2Model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train
from data.caption import generate
from data.distributed import WORLD_SIZE, compile_parts, init_process_group, print_once, run_and_exit
from data.distributed import select_device, select_dtype
from data.settings import read_json
from vlv import DECODERS, VLV, CaptionHead, Encoder, VLVConfig


def random_model(config: VLVConfig, dtype: torch.dtype, device: torch.device) -> VLV:
    """A VLV with random weights, drawn on the device, of the configurations in folders or in data/configs."""
    names = (config.diffusion_model, config.encoder, config.llm)
    known = [ROOT / "data" / "configs" / Path(name).name for name in names]
    sd, florence, llm = (path if path.is_dir() else ROOT / name for path, name in zip(known, names))
    index, head = read_json(sd / "model_index.json"), None
    parts = dict.fromkeys({"text_encoder_3", "tokenizer_3"} & index.keys())  # T5 is left out
    with torch.device(device):
        for part in {"text_encoder", "text_encoder_2", "vae", "unet", "transformer"} & index.keys():
            cls = getattr(importlib.import_module(index[part][0]), index[part][1])
            if index[part][0] == "diffusers":
                parts[part] = cls.from_config(cls.load_config(sd / part)).to(dtype)
            else:
                parts[part] = cls(cls.config_class.from_pretrained(sd / part)).to(dtype)
        net = Florence2Model(AutoConfig.from_pretrained(florence))
        if config.stage == 2:
            head = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm), dtype=torch.float32)
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(sd, low_cpu_mem_usage=False, **parts)
    decoder = DECODERS[index["_class_name"]](config, pipeline)
    prompt_ids = AutoTokenizer.from_pretrained(florence)(config.prompt, return_tensors="pt").input_ids
    encoder = Encoder(config, net, prompt_ids.to(net.device), decoder.embed_dim)
    encoder.davit.to(dtype)
    if config.stage == 2:
        head = CaptionHead(config, head, AutoTokenizer.from_pretrained(llm), decoder.embed_dim)
    model = VLV(config, encoder, decoder, head).to(device)
    model.fill({}, (), (), dtype, torch.float32)
    return model


def synthetic_batch(model: VLV, count: int, latents: bool) -> dict:
    """A micro-batch as the loader makes it: noise, and captions as long as they may be."""
    side, vae = model.config.image_size, model.decoder.vae
    shape = (count, 2 * vae.config.latent_channels, *[side // model.decoder.pipeline.vae_scale_factor] * 2)
    return {"images": np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8),
            "captions": ["a " * model.config.max_caption_tokens] * count,
            "moments": np.zeros(shape, np.float16) if latents else None}


def count_flops(model: VLV, batch: dict, config: train.TrainConfig) -> int:
    """FLOPs of a forward and backward pass. Eagerly: what the compiler meets first under a counter it never
    compiles; and attention as matrix products: its other kernels are not counted everywhere."""
    eager, products = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, eager, products:
        with train.autocast(config):
            losses = model(*train.to_device(batch, config.device))
        sum(losses.values()).backward()
    model.zero_grad()
    return counter.get_total_flops()


def seconds_of(function) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def measure_training(model: VLV, config: train.TrainConfig) -> dict:
    """Rate and FLOPs of train.train_step; hours and dollars of the whole stage."""
    flops = count_flops(model.train(), synthetic_batch(model, 1, config.latents), config)
    optimizer, ddp = train.make_optimizer(model, config)
    batches = itertools.repeat(synthetic_batch(model, config.micro_batch_size, config.latents))
    step = lambda: train.train_step(ddp, optimizer, batches, 0, config)
    starting = seconds_of(step) + seconds_of(step)  # kernels are compiled and chosen
    rate = 8 * config.batch_size / seconds_of(lambda: [step() for _ in range(8)])
    recipe = train.RECIPE[model.config.stage]
    hours = recipe["batch_size"] * recipe["max_steps"] / rate / 3600
    found = {"images_per_second": rate, "tflop_per_image": flops / 1e12,
             "tflop_per_second": rate * flops / 1e12, "seconds_to_start": starting, "hours": hours}
    if config.device == "cuda":
        found["dollars"] = hours * WORLD_SIZE * config.usd_per_gpu_hour
        found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9  # at the peak
    return found


@torch.inference_mode()
def measure_captions(model: VLV, config: train.TrainConfig, dtype: torch.dtype) -> dict:
    """Of captions of 100 tokens: milliseconds a token of the LLM, by a recorded step and by transformers'
    generate; and captions a second, as data/caption.py makes them."""
    model.eval().fill({}, (), (), dtype, dtype)  # no float32 weights, as it loads them
    head, found = model.caption_head, {}
    head.tokenizer.eos_token = head.tokenizer.decode(len(head.tokenizer) - 1)  # so no caption ends early
    ways = {"replayed": lambda c, n: generate(head, c, 1, n), "generate": lambda c, n: head.generate(c, 1, n)}
    for count in (1, 64, 256) if config.device == "cuda" else (1, 2):
        images = torch.from_numpy(synthetic_batch(model, count, False)["images"]).to(config.device)
        embed = lambda: torch.cat([model.embed(eight) for eight in images.split(8)])
        c = embed()
        for name, way in ways.items():
            way(c, 20)
            found[f"ms_a_token_{name}_{count}"] = 1000 * seconds_of(lambda: way(c, 100)) / 100
    seconds = seconds_of(embed) + seconds_of(lambda: ways["replayed"](c, 100))
    return found | {"captions_per_second": WORLD_SIZE * count / seconds}


def main(argv=None) -> None:
    config, of_model, _ = train.read_config(argv)
    config.batch_size = WORLD_SIZE * config.micro_batch_size
    device = select_device(config.device)
    init_process_group(device)
    dtype = select_dtype(config.precision, device)
    config.device, config.precision = device.type, "bf16" if dtype == torch.bfloat16 else "fp32"
    model = random_model(VLVConfig(**of_model), dtype, device)
    train.checkpoint_activations(model, config)
    if config.compile and device.type == "cuda":
        compile_parts(model)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = {"device": card, "processes": WORLD_SIZE, "torch": torch.__version__}
    found |= measure_training(model, config)
    if model.caption_head:
        found |= measure_captions(model, config, dtype)
    print_once(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_and_exit(main)
