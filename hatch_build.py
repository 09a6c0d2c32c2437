"""Puts the start-up line into editable installs too, where the wheel's list of files does not apply."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StartUpLine(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            name = "sglang_minimax_startup.pth"
            build_data["force_include_editable"][f"{self.root}/python/{name}"] = name
