"""Distributions that give plug-ins, as pip would leave them in a folder."""

GROUPS = {kind: f"ddengine.{kind}" for kind in ("matchers", "networks", "datasets")}


def install(folder, name, entries, module="", version="1.0", summary="", entry_points=None):
    """Write the distribution `name` into `folder`; `entries` are {kind: {entry name: value}}.

    `module` is the text of its one module, called as the distribution with underscores.
    """
    meta = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    meta.mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (meta / "METADATA").write_text(about + (f"Summary: {summary}\n" if summary else ""))
    lines = []
    for kind, values in entries.items():
        lines += [f"[{GROUPS[kind]}]", *(f"{key} = {value}" for key, value in values.items())]
    (meta / "entry_points.txt").write_text("\n".join(lines) if entry_points is None else entry_points)
    if module:
        (folder / f"{name.replace('-', '_')}.py").write_text(module)
    return folder
