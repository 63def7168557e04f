"""pip does not read this file: pyproject.toml names the build backend, scikit-build-core, which runs CMakeLists.txt."""

raise SystemExit("fused_attn has no setup.py commands: run `pip install .`, or `pip install -e .` to edit the sources")
