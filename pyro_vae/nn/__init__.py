"""Networks in plain torch that take any leading dimensions."""

from pyro_vae.nn.affine import Affine, OneHot
from pyro_vae.nn.concatenated import Concatenated, Selected
from pyro_vae.nn.conv import convolutional
from pyro_vae.nn.entrywise import Entrywise
from pyro_vae.nn.leading import Reshape, leading
from pyro_vae.nn.masked import EntrySet, WithMask, ZeroFilled
from pyro_vae.nn.mlp import dense, mlp
from pyro_vae.nn.resnet import Residual, conv_block, conv_resnet, dense_block, dense_resnet
from pyro_vae.nn.stacked import Stacked

__all__ = [
    "Affine",
    "Concatenated",
    "EntrySet",
    "Entrywise",
    "OneHot",
    "Reshape",
    "Residual",
    "Selected",
    "Stacked",
    "WithMask",
    "ZeroFilled",
    "conv_block",
    "conv_resnet",
    "convolutional",
    "dense",
    "dense_block",
    "dense_resnet",
    "leading",
    "mlp",
]
