"""mmrm_jax: multimodal reward models in JAX that look at the image.

Dimension key, used in array annotations and as name suffixes throughout the package:

    G  groups in a batch (one image + one prompt)      N  responses per group
    P  prefix tokens                                   R  response tokens
    C  comparisons in a batch                          M  micro-batches in a step
    T  image tiles per group                           V  visual tokens per tile
    H  query heads        K  key/value heads           D  model width        F  MLP width
    L  layers             E  head width
"""

__version__ = "0.1.0"
