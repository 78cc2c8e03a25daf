"""isokern inside other packages: models that run on it, and functions that take the place of other libraries'.

    from isokern.integrations import transformers
    transformers.enable(model)

Each module here is imported by whoever wants it and imports its package, if it needs it at all, when it is used.
"""
