"""``keyveil weights``: list, fetch, verify and find the files that weight cards name."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.weights import Card, WeightsError, card, cards, find, locate


def state(entry: Card) -> str:
    """One word for where a card's file is: ``cached``, ``local``, ``own``, ``missing`` or ``altered``."""
    try:
        found = find(entry.name)
    except WeightsError:
        return "altered"
    if found is None:
        return "missing"
    if found == entry.cached:
        return "cached"
    return "own" if any(s.kind == "own" and s.place == found.name for s in entry.sources) else "local"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def list_cards() -> int:
    """Print all cards; returns 1 if a file on this machine is altered, else 0."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("role")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("licence")
    states = []
    for entry in cards().values():
        states.append(state(entry))
        style = {"missing": "yellow", "altered": "bold red"}.get(states[-1], "green")
        shown = f"[{style}]{states[-1]}[/]"
        table.add_row(entry.name, escape(entry.role), _size(entry.bytes), shown, escape(entry.licence))
    Console().print(table)
    return int("altered" in states)


def fetch(names: Sequence[str] = ()) -> int:
    """Bring files into the cache; returns 1 if one could not be had.

    Args:
        names: Names of cards; none: all.
    """
    console, failed = Console(), 0
    for entry in [card(name) for name in names] or list(cards().values()):
        try:
            console.print(f"[green]ok[/]      {entry.name}  {escape(str(locate(entry.name)))}", soft_wrap=True)
        except WeightsError as error:
            failed += 1
            console.print(f"[bold red]failed[/]  {escape(str(error))}", soft_wrap=True)
    return int(failed > 0)


def verify(names: Sequence[str] = ()) -> int:
    """Check files against their cards without fetching any.

    Returns 1 if a file is altered or a file named here is missing; without names it is only listed.

    Args:
        names: Names of cards; none: all.
    """
    console, failed = Console(), 0
    for entry in [card(name) for name in names] or list(cards().values()):
        try:
            found = find(entry.name)
        except WeightsError as error:
            failed += 1
            console.print(f"[bold red]altered[/]  {escape(str(error))}", soft_wrap=True)
            continue
        failed += found is None and bool(names)
        word = "[yellow]missing[/]" if found is None else "[green]ok[/]     "
        console.print(f"{word}  {entry.name}  {escape(str(found or ''))}".rstrip(), soft_wrap=True)
    return int(failed > 0)


def path(name: str) -> int:
    """Print the path of one verified file, fetched if need be, and nothing else.

    Args:
        name: Name of a card.

    Raises:
        WeightsError: If there is no such card or no source has its file.
    """
    Console().print(str(locate(name)), markup=False, highlight=False, soft_wrap=True)
    return 0
