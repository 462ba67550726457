"""Captioned scenes of our own: a seeded renderer, so that demo and training need no data from outside."""

from pipelines.scenes.compose import Scene, altered, scene
from pipelines.scenes.damage import Damage, key_of, planned_damage
from pipelines.scenes.shards import write_shards

__all__ = ["Damage", "Scene", "altered", "key_of", "planned_damage", "scene", "write_shards"]
