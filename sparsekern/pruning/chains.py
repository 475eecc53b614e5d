"""Which module reads what another one gives, where a model says so itself: inside of nn.Sequential."""

from __future__ import annotations

from torch import nn

Chain = list[tuple[str, nn.Module]]


def chains(model: nn.Module) -> list[Chain]:
    """Every sequence of modules in which each reads the one before, nested ones laid flat, names dotted.

    A module of another class is one link, whatever it contains; sequences inside of it are chains of
    their own. Between two chains nothing is known, as only code says how they are joined.
    """
    found: list[Chain] = []

    def walk(module: nn.Module, name: str, chain: Chain | None) -> None:
        if type(module) is nn.Sequential:
            if chain is None:
                found.append(chain := [])
            for key, child in module._modules.items():
                walk(child, f"{name}.{key}".lstrip("."), chain)
            return
        if chain is not None:
            chain.append((name, module))
        for key, child in module.named_children():
            walk(child, f"{name}.{key}".lstrip("."), None)

    walk(model, "", None)
    return found
