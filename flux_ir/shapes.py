"""Array shapes by name, for signatures. Checked while pytest runs (see `tests/conftest.py`) and never otherwise.

Axis names: `batch` pictures, `tokens` positions of one stream or of text and image together, `img`, `txt` and `cond`
(a reference picture's) positions of one stream, `d` the width of the network, `packed` the values of 2 x 2 latent
pixels, `context` the width of T5's output, `pooled` that of CLIP's, `axes` the numbers of a position id, `h w` pixels,
`lh lw` latent pixels, `c` latent channels, `fh fw` pixels of a feature map. A name stands for one number within one
call; names that begin with `_` stand for any.
"""

from jaxtyping import Complex64, Float, Int64, UInt8
from torch import Tensor

# Transformer
Tokens = Float[Tensor, "batch tokens d"]
ImgTokens = Float[Tensor, "batch img d"]
TxtTokens = Float[Tensor, "batch txt d"]
PackedLatent = Float[Tensor, "batch img packed"]
CondLatent = Float[Tensor, "batch cond packed"]
Velocity = Float[Tensor, "batch img packed"]
Conditioning = Float[Tensor, "batch d"]
Pooled = Float[Tensor, "batch pooled"]
Heads = Float[Tensor, "batch heads tokens head_dim"]
Context = Float[Tensor, "batch txt context"]
ImgIds = Float[Tensor, "batch img axes"]
TxtIds = Float[Tensor, "batch txt axes"]
CondIds = Float[Tensor, "batch cond axes"]
PositionIds = Float[Tensor, "batch _tokens axes"]  # of either stream, or of both
Rotation = Complex64[Tensor, "batch 1 tokens half_head_dim"]
PerSample = Float[Tensor, "batch"]
Shift = Float[Tensor, "batch 1 d"]

# Text and picture encoders
TokenIds = Int64[Tensor, "batch tokens"]
PositionBias = Float[Tensor, "1 heads tokens tokens"]

# Autoencoder
Latent = Float[Tensor, "batch c lh lw"]
Image = Float[Tensor, "batch 3 h w"]
FeatureMap = Float[Tensor, "batch channels fh fw"]
MixedFeatureMap = Float[Tensor, "batch _out_channels fh fw"]
HalvedFeatureMap = Float[Tensor, "batch channels fh//2 fw//2"]
DoubledFeatureMap = Float[Tensor, "batch channels 2*fh 2*fw"]
AnyFeatureMap = Float[Tensor, "batch _channels _fh _fw"]
Pixels = UInt8[Tensor, "batch h w 3"]
