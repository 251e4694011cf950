"""The gradient of one pre-training step: `gathered.py PAIRS.parquet TARGET.safetensors`, alone or under torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from blip_core.data.pairs import PairSource, iterate_texts
from blip_core.data.stream import PairStream
from blip_core.data.transforms import eval_transform
from blip_core.med.architecture import MEDConfig
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.training import parallel, processes
from blip_core.training.objectives import Pretraining, Step
from blip_core.training.recipe import TrainConfig

SIZES = MEDConfig("tiny", image_size=16, patch_size=8, image_width=32, text_width=32, projection=8)


def main(pairs: Path, target: Path) -> None:
    accelerator = parallel.new_accelerator()
    sources = [PairSource(pairs)]
    words = Tokenizer.train(iterate_texts(sources), 100, 12)
    torch.manual_seed(0)
    architecture = replace(SIZES.architecture(), dropout=0.0, drop_path=0.0)
    config = TrainConfig(batch_size=12, queue_size=10, alpha=0.4)
    objective = Pretraining(
        build_med(architecture, len(words), words.encode_id, words.decode_id), architecture, words, config
    )
    model = parallel.distribute(objective, config, accelerator)
    stream = PairStream(sources, 12, eval_transform(16), 0, processes.rank(), processes.world(), lanes=4)
    batch = objective.tokenize(next(stream.batches()), accelerator.device)
    tokens = processes.mean(batch.mask[:, 1:].sum().float())
    objective.begin_step()
    losses = model(batch, Step(3, 7, tokens))
    torch.stack(list(losses.values())).sum().backward()
    found = {f"loss.{name}": processes.mean(loss.detach()) for name, loss in losses.items()}
    found |= {name: weight.grad for name, weight in objective.named_parameters() if weight.grad is not None}
    found |= {"queue.images": objective.queue.images, "queue.image_ids": objective.queue.image_ids}
    if processes.rank() == 0:
        save_file(found, target)
    processes.wait()
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
