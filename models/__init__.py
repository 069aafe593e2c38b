"""Networks, templates, adapters and devices: what travels with a checkpoint, nothing about training."""

from models.chatglm.registration import register

register()
