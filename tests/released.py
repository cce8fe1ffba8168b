"""The names that BERT's weights were released under, written out the other way round."""

import torch


def released_names(model, kind):
    """The weights of ``SpanFinder(Bert(...))`` under released names."""
    parts = {
        "embedding.weight": "embeddings.word_embeddings.weight",
        "types.weight": "embeddings.token_type_embeddings.weight",
        "at_input.learned.weight": "embeddings.position_embeddings.weight",
        "norm": "embeddings.LayerNorm", "attn.proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    found = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("body.")
        if name.startswith("head."):
            found[name.replace("head", "qa_outputs")] = value
            continue
        place = "bert."
        if name.startswith("blocks."):
            _, layer, name = name.split(".", 2)
            place += f"encoder.layer.{layer}."
        if "table" in name:
            found[place + "attention.self.distance_embedding.weight"] = value[0].T
        elif "qkv" in name:
            for which, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{place}attention.self.{which}.{name.rpartition('.')[2]}"] = third
        elif name in parts:
            found[place + parts[name]] = value
        else:
            module, _, kind_of = name.rpartition(".")
            found[f"{place}{parts[module]}.{kind_of}"] = value
    if kind != "absolute":
        found["bert.embeddings.position_embeddings.weight"] = torch.randn(12, model.body.dim)
    return found
