"""Import this module to register every component that the package ships."""

import flora.client.corrections
import flora.client.objectives
import flora.client.optimizers
import flora.client.penalties
import flora.client.personalization
import flora.client.sampling
import flora.client.self_training
import flora.clip.adapters.dual_lora
import flora.clip.adapters.full
import flora.clip.adapters.heads_and_prompts
import flora.clip.adapters.lora
import flora.clip.towers.tokens
import flora.communication.compressors
import flora.communication.network
import flora.communication.ranks
import flora.communication.sampling
import flora.data.augmentation
import flora.data.datasets.digits
import flora.data.datasets.folders
import flora.data.datasets.glyphs
import flora.data.datasets.tiny_imagenet
import flora.data.datasets.torchvision_sets
import flora.data.few_shot
import flora.data.partition
import flora.data.splits
import flora.federated.buffered
import flora.federated.synchronous
import flora.server.aggregators
import flora.server.optimizers
import flora.server.strategies.averaging
import flora.server.strategies.factors
import flora.server.strategies.products
import flora.server.strategies.residuals
import flora.server.training
import flora.trackers.files
import flora.trackers.services  # noqa: F401
