"""Adapters that exist already, ours and PEFT's: what their folders hold, and experts that start from it."""

from dsmoelora.adapters.given.folders import GivenExperts, GivenFolder, GivenLayer, open_folder, open_folders
from dsmoelora.adapters.given.settings import settings_of
from dsmoelora.adapters.given.start import check_given, start_from_folders, take_experts

__all__ = [
    "GivenExperts",
    "GivenFolder",
    "GivenLayer",
    "check_given",
    "open_folder",
    "open_folders",
    "settings_of",
    "start_from_folders",
    "take_experts",
]
