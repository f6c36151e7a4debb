"""
Beyond the paper: decoders that read two CLIPs. Whatever imports this can load Stable Diffusion XL, 3 and 3.5:

    from data import two_clips

Both read ẑ and c of the width D = D1 + D2 of the two. SD 3 and 3.5 learned rectified flow (Esser et al.
2024); T5, which they can do without, is left out.
"""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers.masking_utils import create_causal_mask

from vlv import DECODERS, DiffusionDecoder, VLVConfig, without_autocast


def run_layers(clip, hidden: torch.Tensor, layers) -> torch.Tensor:
    """Some of CLIP's layers on (B, N, width) -> (B, N, width)."""
    mask = create_causal_mask(clip.config, hidden, attention_mask=None, past_key_values=None)
    for layer in layers:
        hidden = layer(hidden, mask, is_causal=True)
    return hidden


class XLDecoder(DiffusionDecoder):
    """Stable Diffusion XL."""

    pipeline_arguments = {"add_watermarker": False}
    text_arguments = {}  # of the pipeline, beside a text

    def __init__(self, config: VLVConfig, pipeline):
        super().__init__(config, pipeline)
        self.text_encoder_2 = pipeline.text_encoder_2.requires_grad_(False)
        self.clips = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.nets = [getattr(clip, "text_model", clip) for clip in self.clips]  # without a projection
        self.widths = [clip.config.hidden_size for clip in self.clips]
        self.embed_dim = sum(self.widths)

    def split(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """(B, N, D1 + D2) -> the part of each CLIP."""
        return [part.to(net.dtype) for net, part in zip(self.nets, vectors.split(self.widths, -1))]

    def encode_text(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """ẑ, (B, N, D1 + D2) -> c, of the same shape: what each CLIP has before its last layer."""
        parts = []
        for net, part in zip(self.nets, self.split(token_embeds)):
            with without_autocast(net):
                parts.append(run_layers(net, net.embeddings(inputs_embeds=part), net.encoder.layers[:-1]))
        return torch.cat(parts, -1)

    def condition(self, c: torch.Tensor) -> dict:
        """What the denoiser reads: c, in SD 3 with zeros up to T5's width; and, pooled, the last position,
        which has seen all others, after the last layer of each CLIP with a projection (SDXL: the second)."""
        pooled = []
        for clip, net, part in zip(self.clips, self.nets, self.split(c)):
            if hasattr(clip, "text_projection"):
                with without_autocast(clip):
                    last = run_layers(net, part, net.encoder.layers[-1:])[:, -1]
                    pooled.append(clip.text_projection(net.final_layer_norm(last)))
        width = self.unet.config.get("joint_attention_dim", self.embed_dim)
        c = F.pad(c, (0, width - self.embed_dim)).to(self.unet.dtype)
        return {"prompt_embeds": c, "pooled_prompt_embeds": torch.cat(pooled, -1).to(c.dtype)}

    def predict(self, noisy, timesteps, c) -> torch.Tensor:
        given, side = self.condition(c), self.image_size
        sizes = torch.tensor([side, side, 0, 0, side, side])  # the original, the crop's corner, the result
        added = {"text_embeds": given["pooled_prompt_embeds"],
                 "time_ids": sizes.to(given["prompt_embeds"], non_blocking=True).expand(len(c), -1)}
        return self.unet(noisy, timesteps, given["prompt_embeds"], added_cond_kwargs=added).sample

    def encode_prompt(self, texts: str | list[str]) -> torch.Tensor:
        """See DiffusionDecoder. Of a text the pipeline pools the end token, and `condition` the padding. SD 3
        must have its denoiser."""
        c = self.pipeline.encode_prompt(texts, do_classifier_free_guidance=False, **self.text_arguments)[0]
        return c[..., : self.embed_dim]

    def pipeline_inputs(self, prompt: torch.Tensor | list[str]) -> dict:
        if not isinstance(prompt, torch.Tensor):
            return {"prompt": prompt} | self.text_arguments
        _, empty, _, pooled = self.pipeline.encode_prompt("", **self.text_arguments)
        empty = empty[:, : prompt.shape[1]].expand(len(prompt), -1, -1)
        return self.condition(prompt) | {"negative_prompt_embeds": empty,
                                         "negative_pooled_prompt_embeds": pooled.expand(len(prompt), -1)}


class FlowDecoder(XLDecoder):
    """Stable Diffusion 3 and 3.5: a transformer that predicts a velocity. Timesteps are indices into the
    scheduler's table, where 0 is the most noise."""

    pipeline_arguments = {}
    text_arguments = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 0}  # no T5, and no zeros

    def __init__(self, config: VLVConfig, pipeline):
        super().__init__(config, pipeline)
        self.noise_schedule = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)

    def draw_timesteps(self, count: int, device) -> torch.Tensor:
        """(count,) int64, logit-normal (Esser et al. 2024, section 3.1)."""
        return (self.num_timesteps * torch.randn(count, device=device).sigmoid()).long()

    def add_noise(self, latents, epsilon, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (z_t, its velocity)."""
        sigmas = self.noise_schedule.sigmas.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * epsilon, epsilon - latents

    def predict(self, noisy, timesteps, c) -> torch.Tensor:
        given, times = self.condition(c), self.noise_schedule.timesteps.to(c.device)[timesteps]
        return self.unet(noisy, given["prompt_embeds"], given["pooled_prompt_embeds"], times).sample


DECODERS |= {"StableDiffusionXLPipeline": XLDecoder, "StableDiffusion3Pipeline": FlowDecoder}
