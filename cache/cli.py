"""``isokern cache``: look at, move and clean what the tuner stored.

Exit codes: 0 done; 1 the answer is no (``verify`` found invalid files, ``diff`` found differences); 2 the
command could not do what it was asked, with one line on standard error that says why.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ArgumentValueError, IsokernError, StoreError, UnknownNameError
from .audit import Checked, check_layer
from .environment import local_environments
from .found import Located
from .layer import Layer
from .prune import Criteria, find_removals, remove
from .render import candidates_table, console, differences_table, entries_table, summary_lines
from .shipped import SHIPPED
from .shipping import Current, CurrentOf
from .shipping import ship as make_tables
from .store import CacheWarning, Store
from .store_diff import diff_entries, diff_stores
from .transfer import absorb, load_bundle, movable, save_bundle

__all__ = ["app"]

app = typer.Typer(
    name="cache",
    help="Look at, move and clean the tuning store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Root = Annotated[
    Path | None, typer.Option("--root", help="Use the store at this directory alone, not this user's layers.")
]
OpFilter = Annotated[str | None, typer.Option("--op", help="Only entries of this op.")]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """One line for each error and warning, without the traceback or source line that only a developer wants."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CacheWarning)
            try:
                yield
            finally:
                for warning in caught:
                    typer.echo(f"warning: {warning.message}", err=True)
    except IsokernError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"error: {error.filename or 'store'}: {error.strerror or error}", err=True)
        raise typer.Exit(2) from error


def _open(root: Path | None) -> Store:
    return Store.default() if root is None else _at(root)


def _at(root: Path) -> Store:
    return Store([Layer("explicit", root.expanduser().absolute(), writable=True)])


def _existing(root: Path) -> Store:
    if not root.expanduser().is_dir():
        raise StoreError(f"{root} is not a directory")
    return _at(root)


def _writable(store: Store) -> Layer:
    if store.writable_layer is None:
        raise StoreError("the store has no writable layer")
    return store.writable_layer


def _select(store: Store, op: str | None = None, layer: str | None = None, environment: str = "") -> list[Located]:
    return [
        item
        for item in store.entries()
        if op in (None, item.entry.op)
        and layer in (None, item.layer_name)
        and item.entry.environment.startswith(environment)
    ]


def _find(store: Store, reference: str) -> list[Located]:
    """Entries by ``[ENVIRONMENT_PREFIX/]KEY_PREFIX``, all of one key."""
    environment, _, prefix = reference.rpartition("/")
    found = [item for item in _select(store, environment=environment) if item.entry.key_hash.startswith(prefix)]
    keys = sorted({item.entry.key_hash for item in found})
    if not found:
        raise StoreError(f"no entry's key hash starts with {reference!r}")
    if len(keys) > 1:
        raise StoreError(f"{reference!r} is ambiguous: {', '.join(keys)}")
    return found


@app.command("list")
def list_entries(
    root: Root = None,
    op: OpFilter = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Only entries of this layer.")] = None,
) -> None:
    """List all entries, in order of precedence; the shipped ones, which everybody has, only where asked for."""
    with _one_line_errors():
        store = _open(root)
        names = [known.name for known in store.layers]
        if layer is not None and layer not in names:
            raise UnknownNameError("layer", layer, names)
        found = _select(store, op, layer)
        mine = [item for item in found if layer is not None or item.layer_name != SHIPPED]
        if mine:
            console().print(entries_table(mine))
        shipped = len(found) - len(mine)
        typer.echo(f"{len(mine)} entries" + (f", and {shipped} shipped (--layer {SHIPPED})" if shipped else ""))


@app.command()
def show(key: Annotated[str, typer.Argument(metavar="KEYHASH_PREFIX")], root: Root = None) -> None:
    """Show an entry: key, choice, and every candidate with its status, reason and time."""
    with _one_line_errors():
        for item in _find(_open(root), key):
            for line in summary_lines(item):
                typer.echo(line)
            console().print(candidates_table(item.entry))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    root: Root = None,
) -> None:
    """Compare two entries, or two store roots, field by field.

    Entries are named by [ENVIRONMENT_PREFIX/]KEYHASH_PREFIX. Exits with 1 if anything differs.
    """
    with _one_line_errors():
        # a hash has no separators and is no directory, unless someone made one of that name
        if Path(first).is_dir() or Path(second).is_dir():
            stores = [_existing(Path(path)) for path in (first, second)]
            found = diff_stores(stores[0].entries(), stores[1].entries())
        else:
            store = _open(root)
            found = diff_entries(_single(store, first), _single(store, second))
        if found:
            console().print(differences_table(found, first, second))
            raise typer.Exit(1)
        typer.echo("no differences")


def _single(store: Store, reference: str) -> Located:
    found = _find(store, reference)
    environments = sorted({item.entry.environment for item in found})
    if len(environments) > 1:
        raise StoreError(f"{reference!r} is in several environments: name one of {', '.join(environments)}/")
    return found[0]


@app.command("export")
def export_bundle(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    root: Root = None,
    op: OpFilter = None,
    environment: Annotated[str, typer.Option("--environment", help="Only this environment (prefix).")] = "",
) -> None:
    """Write entries and their environments into one file; shipped ones are everywhere already."""
    with _one_line_errors():
        tuned = [x for x in _select(_open(root), op, environment=environment) if x.layer_name != SHIPPED]
        parcels, homeless = movable(tuned)
        _report_homeless(homeless)
        save_bundle(file, parcels)
        typer.echo(f"{len(parcels)} entries written to {file}")


@app.command("import")
def import_bundle(file: Annotated[Path, typer.Argument(metavar="FILE")], root: Root = None) -> None:
    """Read a file written by export: validated as a whole before anything is written; newer entries stay."""
    with _one_line_errors():
        parcels = load_bundle(file)
        layer = _writable(_open(root))
        counts = absorb(layer, parcels)
        typer.echo(f"{counts.added} added, {counts.replaced} replaced, {counts.kept} kept in {layer.root}")


@app.command()
def merge(source: Annotated[Path, typer.Argument(metavar="SRC_ROOT")], root: Root = None) -> None:
    """Take over another store's entries; of one key the newer measurement wins."""
    with _one_line_errors():
        parcels, homeless = movable(_existing(source).entries())
        _report_homeless(homeless)
        layer = _writable(_open(root))
        counts = absorb(layer, parcels)
        typer.echo(f"{counts.added} added, {counts.replaced} replaced, {counts.kept} kept in {layer.root}")


def _report_homeless(count: int) -> None:
    if count:
        typer.echo(f"skipped {count} entries whose manifest is missing or damaged (see verify)", err=True)


@app.command()
def ship(
    *,
    root: Annotated[
        Path | None, typer.Option("--root", help="The store to make tables of; if not given, what this user tuned.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of tables: made, or brought up to date.")],
    environment: Annotated[str, typer.Option("--environment", help="Only this environment (prefix).")] = "",
) -> None:
    """Make the tables that travel in the package (its folder cache/tables) of a store.

    Only what is current, with the evidence for what is near the choice, and nothing of the machine but its silicon and
    versions. Of one silicon's key the newer measurement stays.
    """
    with _one_line_errors():
        source = _writable(_open(None) if root is None else _existing(root))
        folder = Layer(SHIPPED, out.expanduser().absolute())
        done = make_tables(source, folder, _current_of(), environment)
        for reason, count in sorted(done.left_out.items()):
            typer.echo(f"left out {count} entries {reason}", err=True)
        counts = f"{done.added} added, {done.replaced} replaced, {done.kept} kept, {done.removed} removed"
        typer.echo(f"{counts}: {done.entries} entries in {folder.root}, {done.bytes / 1024:.1f} KiB")


def _current_of() -> CurrentOf:
    from .. import registry

    @functools.cache
    def current(op: str) -> Current | None:
        if op not in registry.names():
            return None
        default = registry.default
        return Current(default.contract_version(op), default.fingerprints(op), default.source_fingerprints(op))

    return current


@app.command()
def prune(
    *,
    root: Root = None,
    other_environments: Annotated[
        bool, typer.Option("--other-environments", help="What this machine, as it is now, cannot use.")
    ] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Entries whose chosen backend has changed.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Entries measured before that."),
    ] = None,
    invalid: Annotated[
        bool, typer.Option("--invalid", help="Files that verify calls invalid (strays it only names).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove entries from the writable layer; abandoned temporary files always."""
    with _one_line_errors():
        criteria = Criteria(
            keep_environments=local_environments() if other_environments else None,
            fingerprints_of=_fingerprints_of() if stale else None,
            older_than=None if older_than is None else _days(older_than),
            invalid=invalid,
        )
        removals = list(find_removals(_writable(_open(root)), criteria))
        for removal in removals:
            typer.echo(f"{removal.path}: {removal.why}")
        if not dry_run:
            remove(removals)
        typer.echo(f"{len(removals)} files {'would be ' if dry_run else ''}removed")


def _days(count: float) -> timedelta:
    try:
        return timedelta(days=count)
    except OverflowError as error:
        expected = f"a number of days, at most {timedelta.max.days}"
        raise ArgumentValueError("--older-than", expected, f"{count:g}") from error


def _fingerprints_of() -> Callable[[str], Mapping[str, str] | None]:
    from .. import registry

    @functools.cache  # hashing the sources once per op, not per entry
    def current(op: str) -> Mapping[str, str] | None:
        try:
            return {name: backend.fingerprint() for name, backend in registry.backends(op).items()}
        except UnknownNameError:
            return None

    return current


@app.command()
def verify(root: Root = None) -> None:
    """Check every file of every layer. Exits with 1, naming them, if any is invalid.

    Files that are none of the store's, and that nothing reads, are named as strays and count as neither.
    """
    with _one_line_errors():
        by_layer = [(layer, list(check_layer(layer))) for layer in _open(root).layers]
        for layer, files in by_layer if len(by_layer) > 1 else ():
            typer.echo(f"{layer.name}\t{layer.root}\t{_counts(files)}")
        everything = [found for _, files in by_layer for found in files]
        for found in everything:
            if found.stray:
                typer.echo(f"{found.path}: stray, none of the store's files; nothing reads it", err=True)
            elif found.problem:
                typer.echo(f"{found.path}: {found.problem}", err=True)
        typer.echo(_counts(everything, " checked"))
        if any(found.problem for found in everything):
            raise typer.Exit(1)


def _counts(files: Sequence[Checked], done: str = "") -> str:
    strays = sum(found.stray for found in files)
    invalid = sum(bool(found.problem) for found in files)
    beside = f", {strays} stray{'s' * (strays > 1)} beside them" if strays else ""
    return f"{len(files) - strays} files{done}, {invalid} invalid{beside}"


@app.command()
def path(root: Root = None) -> None:
    """Print the layers in order of precedence: name, root and what the store may do there, tab-separated."""
    with _one_line_errors():
        store = _open(root)
        for layer in store.layers:
            use = "written" if layer is store.writable_layer else "read"
            state = use if layer.root.is_dir() else f"{use}, does not exist"
            typer.echo(f"{layer.name}\t{layer.root}\t{state}")
