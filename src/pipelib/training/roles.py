"""The roles of a model's parameters: Muon treats them differently, and the sizes of updates are shown by role."""

from torch import nn

from pipelib.model.decoder import Decoder

MATRICES, EMBEDDING, HEAD, VECTORS = "matrices", "embedding", "head", "vectors"
ROLES = (MATRICES, EMBEDDING, HEAD, VECTORS)
"""Matrices of blocks; embeddings of tokens and positions, with the output layer where it is tied to them; an output layer of its
own; scales of norms, and biases."""


def roles_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters of each role by their names, in the order of `ROLES`; a role without any is left out."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.head if isinstance(model, Decoder) else None
    found: dict[str, dict[str, nn.Parameter]] = {role: {} for role in ROLES}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            role = VECTORS
        elif any(parameter is weight for weight in embeddings):
            role = EMBEDDING
        else:
            role = HEAD if parameter is head else MATRICES
        found[role][name] = parameter
    return {role: parameters for role, parameters in found.items() if parameters}
