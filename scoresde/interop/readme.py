"""The model card of a saved model: a README for the Hub, with what the folder says and how to load it."""

from __future__ import annotations

import json

from scoresde._doors import checked
from scoresde._printing import short
from scoresde.denoisers.card import Card
from scoresde.denoisers.network import Denoiser
from scoresde.plan.table import Plan


@checked
def model_card(model: Denoiser, name: str, card: Card | None = None) -> str:
    """Text of a README, in Markdown with the Hub's header.

    Arguments:
        model: Denoiser.
        name: Name of the model, such as ``"org/name"``, or a path.
        card: Card of the model, by default ``model.card``.
    """
    card = card or model.card or Card()
    title = name.rstrip("/").split("/")[-1]
    header = ["library_name: scoresde", "tags:", "- diffusion", "- scoresde"]
    if card.licence:
        header.insert(0, f"license: {json.dumps(card.licence)}")
    solver = None if card.solver is None else card.solver.name if isinstance(card.solver, Plan) else repr(card.solver)
    budget = card.solver.nfe if isinstance(card.solver, Plan) else card.nfe
    facts = {
        "network": short(model.net),
        "process": model.sde,
        "prediction of the network": model.predicts,
        "preconditioning": model.precondition,
        "conditions": ", ".join(card.conditions or ()),
        "shape of a sample": card.event,
        "solver": f"{solver}{' (a plan)' if isinstance(card.solver, Plan) else ''}" if solver else "",
        "function evaluations": budget,
        "licence": card.licence,
    }
    table = [f"| {fact} | `{value}` |" for fact, value in facts.items() if value not in (None, "")]
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {title}",
        card.notes,
        "A diffusion model for [scoresde](https://pypi.org/project/scoresde/).",
        "\n".join(["| | |", "|---|---|", *table]),
        "\n".join(["```python", *_example(name, card), "```"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(name: str, card: Card) -> list[str]:
    """Python that loads the model and draws samples as the card says."""
    shape = ", ".join(map(str, (16, *(card.event or ("...",)))))
    arguments = ["model" if not card.conditions else f"model.given({', '.join(f'{c}=...' for c in card.conditions)})"]
    arguments.append(f"({shape})")
    if card.solver is not None:
        arguments.append("model.card.solver")
        arguments += [] if isinstance(card.solver, Plan) else ["nfe=model.card.nfe"] * (card.nfe is not None)
    elif card.nfe is not None:
        arguments.append("nfe=model.card.nfe")
    draw = f"ss.sample({', '.join(arguments)})"
    return [
        "import scoresde as ss",
        f"model = ss.interop.from_pretrained({name!r})",
        f"x = model.card.scale.inverse({draw})" if card.scale is not None else f"x = {draw}",
    ]
