"""Lines of `tropd train --dry-run` about the memory of each GPU and about ports.

The plan itself is in `config.plan`. Of the files only config.json of each model is read, if it is there: a plan for a
cluster can be read on any machine. Invariant: an estimated number is marked as an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping

from tropd_mcore.config.derived import is_served, model_key, model_paths, started_servers
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.server_checks import gpus_of
from tropd_mcore.config.teachers import by_path_key

GIB = 2**30


def rows(config: Config, ranks: int, *, address: str, port: int) -> dict[str, str]:
    """Return {name: text} of the lines. The job has `ranks`, which meet at `address` and `port` (0 = any free one)."""
    found = _memory(config, ranks) if config.platform.kind != "cpu" else {}
    return {**found, "ports": _ports(config, address, port)}


def _memory(config: Config, ranks: int) -> dict[str, str]:
    started = started_servers(config)
    needed = model_paths(config)
    teachers, here = by_path_key(config), {model_key(key) for key in started}
    for key, teacher in teachers.items():
        if key not in here and (teacher.served or not config.objective.reads_teacher):
            del needed[key]
    missing = [str(path) for path in needed.values() if not (path / "config.json").is_file()]
    if missing:
        return {"memory": f"not estimated: no config.json in {', '.join(dict.fromkeys(missing))}"}
    from tropd_mcore.errors import ModelError
    from tropd_mcore.weights.architecture import UnsupportedFamily, read_architecture
    from tropd_mcore.weights.gpu_memory import file_memory, rank_memory, server_memory

    models = {}
    try:
        for key, path in needed.items():
            try:
                models[key] = read_architecture(path)
            except UnsupportedFamily:
                if not is_served(config, key):
                    raise
    except ModelError as error:
        return {"memory": f"not estimated: {error}"}
    rank = rank_memory(config, models, ranks)
    lines = {"memory": f"per rank, estimated: {_parts(rank)}"}
    beside: dict[tuple[int, int], int] = {}
    """(node, GPU) -> bytes of its servers"""
    for key, server in started.items():
        model = model_key(key)
        dtype = teachers[model].config.dtype if model in teachers else config.student.dtype
        if model in models:
            parts = server_memory(models[model], server, dtype)
        else:  # a family that only SGLang knows
            parts = file_memory(needed[model], server)
        unsized = "" if "KV cache" in parts else f"; with its KV cache at most {server.mem_fraction} of the free memory"
        if model not in models and server.max_total_tokens is not None:
            unsized = "; its KV cache is not estimated, because only SGLang knows this family of models"
        lines[key] = f"per GPU, estimated: {_parts(parts)}, without its context and CUDA graphs{unsized}"
        for gpu in gpus_of(server):
            beside[server.node, gpu] = beside.get((server.node, gpu), 0) + sum(parts.values())
    if beside:
        fullest = max(beside, key=lambda place: beside[place])
        node = f" of node {fullest[0]}" if any(place[0] for place in beside) else ""
        both = (sum(rank.values()) + beside[fullest]) / GIB
        turns = "; release_memory: they take turns" if any(server.release_memory for server in started.values()) else ""
        lines["fullest GPU"] = f"GPU {fullest[1]}{node}: {both:.1f} GiB with a rank and its servers{turns}"
    return _together(lines)


def _listens(server: ServerConfig) -> str:
    return f"the address of node {server.node}" if server.node else "the loopback address"


def _together(lines: Mapping[str, str]) -> dict[str, str]:
    """Lines of one text in a row as one, under the name of the first."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(lines.values()):
        names = [name for name, each in lines.items() if each == text]
        found[names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"] = text
    return found


def _parts(parts: Mapping[str, int]) -> str:
    listed = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"{listed} = {sum(parts.values()) / GIB:.1f} GiB"


def _ports(config: Config, address: str, port: int) -> str:
    servers = (
        f"{key} on {f'port {server.port}' if server.port is not None else 'a free port'} of {_listens(server)}"
        for key, server in started_servers(config).items()
    )
    return "; ".join([f"ranks meet at {address}, {f'port {port}' if port else 'a free port'}", *servers])
