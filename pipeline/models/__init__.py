"""Generator families. A file's name is its registration.

A file defines
    build(config, spec) -> nn.Module                    the network, freshly initialised
    Objective(model, config)                            contracts.Objective over it
    Generator(model, config, spec, parts)               contracts.ImageGenerator over it
where `spec` and `parts` are models/_spec.py's.
"""

from pipeline import registry

__path__ = registry.search_path(__name__)
