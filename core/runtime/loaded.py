"""A decoder as an engine's settings want it."""

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError
from infopt.core.hardware.card import find_card
from infopt.core.layers.choice import Choice, NativeChoice, native_choice
from infopt.core.models.decoder import Decoder
from infopt.core.models.kept_weights import KeptWeights
from infopt.core.models.load import load_decoder
from infopt.core.recipe.serve import EngineSettings


def load_for(
    settings: EngineSettings, artifact: Artifact, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """`load_decoder`, with the kernels that the settings ask for; raises as it and the choice.

    The threads that they ask for are the whole process's from now on.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    fixed = settings.deterministic
    choice: Choice | None
    rounds = settings.activations == "int8"
    choice = native_choice(settings.kernels, device, dtype, deterministic=fixed, rounds=rounds)
    if rounds and choice is None:
        raise UnsupportedError(
            "activations int8 needs the native kernels of a CPU, in float32 or bfloat16",
            "leave activations as they are: auto",
        )
    card = find_card(settings.kernels, device)
    if card is not None:
        # Here, so that a CPU need not have Triton.
        from infopt.core.layers.card_products import CardChoice

        choice = CardChoice(card)
    kept = None
    if settings.repack_cache and isinstance(choice, NativeChoice):
        kept = KeptWeights(artifact, choice)
    decoder = load_decoder(
        artifact, dtype, device, deterministic=fixed, native=choice, card=card, kept=kept
    )
    if card is None:
        return decoder
    from infopt.core.models.card_layers import with_rounding_fused

    return with_rounding_fused(decoder)
