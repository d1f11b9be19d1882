"""Image tokenizers: image <-> grid of discrete tokens. A file's name is its registration.

A file defines `build(config, image_size) -> nn.Module`, a contracts.ImageTokenizer whose
`forward(images)` gives the reconstruction through the quantiser with gradients, and the quantiser's
own loss (0 where it has none).
"""

from pipeline import registry

__path__ = registry.search_path(__name__)
