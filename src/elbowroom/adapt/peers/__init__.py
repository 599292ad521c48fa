"""Adapters of the peers' trained models. They read the models' attributes, and import none of the peers' packages."""
