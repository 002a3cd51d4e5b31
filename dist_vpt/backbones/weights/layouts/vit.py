"""Vision transformers in PyTorch with timm's names: DeiT, DINO and others, MAE, MoCo v3."""

from dist_vpt.backbones.weights.layouts.base import CLASSIFIER, Layout


def _in_base_encoder(name: str) -> tuple[str, ...]:
    return (f"base_encoder.{name}",)


TIMM = Layout("vision transformer, PyTorch with timm's names", "vit", CLASSIFIER)
MAE = Layout("masked autoencoder, PyTorch", "vit", rf"{CLASSIFIER}|mask_token$|decoder_")
MOCOV3 = Layout(
    "MoCo v3 with both encoders, PyTorch",
    "vit",
    r"momentum_encoder\.|predictor\.|base_encoder\.head\.",
    _in_base_encoder,
)
MOCOV3_LINEAR = Layout("MoCo v3 after linear probing, PyTorch", "vit", CLASSIFIER)
