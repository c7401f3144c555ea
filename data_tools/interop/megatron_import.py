"""Megatron's .bin/.idx to a token store: the tokens as they are, EOS (and BOS, where the tokenizer has one) completed.

    documents -> [check ids, split by hash of the ids, count bytes] -> segments -> shards -> manifests

Held-out documents are chosen by the hash of their ids without BOS and EOS. ``import.json`` records the position behind
the last finished segment, so a killed import goes on there and ends with the same bytes. Refused: damaged files, ids
beyond the tokenizer's vocabulary, a folder that holds something else. Documents without tokens are counted and left
out. Memory is bounded by the longest document.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.token_store import SplitState, SplitWriter, StoreLabel
from cpt.rundir import DataError, write_atomic
from data_tools.encoders import Encoder, load_encoder
from data_tools.folder_lock import hold_folder
from data_tools.interop.byte_counts import byte_counter
from data_tools.interop.megatron_index import MegatronIndex, open_index
from data_tools.tokenizing.build_file import load_state
from data_tools.tokenizing.jobs import is_heldout

SPLITS = ("train", "heldout")
IMPORT_NAME = "import.json"
IMPORT_VERSION = 1
_PROGRESS_EVERY = 1 << 20  # tokens
_SAMPLE_TOKENS = 1 << 19

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MegatronRequest:
    """What ``cpt data import-megatron`` asks for; every field decides the bytes of the store."""

    prefix: Path
    tokenizer: Path
    out: Path
    source: str
    domain: str
    heldout_fraction: float = 0.01
    eos_token: str | None = None
    segment_tokens: int = 1 << 26


@dataclass
class _State:
    """``import.json``: the request, the first document that is not in a finished shard, and what came before it."""

    request: dict[str, Any]
    document: int = 0
    empty_documents: int = 0
    eos_added: int = 0
    bos_added: int = 0
    finished: bool = False
    splits: dict[str, SplitState] = field(default_factory=lambda: {split: SplitState() for split in SPLITS})

    def save(self, folder: Path) -> None:
        content = {"format_version": IMPORT_VERSION, **asdict(self)}
        write_atomic(folder / IMPORT_NAME, json.dumps(content, indent=1) + "\n")


def import_megatron(request: MegatronRequest, *, progress: Progress | None = None) -> dict[str, Any]:
    """Build ``request.out``/{train,heldout} from ``request.prefix``, or finish, or find it finished; returns counts.

    Raises:
        DataError: damaged files, ids of another tokenizer, a folder of another request, another writer in it.
    """
    if not 0 <= request.heldout_fraction < 1:
        raise DataError(f"heldout_fraction is {request.heldout_fraction!r}, must be 0 <= x < 1")
    index = open_index(request.prefix)
    encoder = load_encoder(request.tokenizer, eos_token=request.eos_token)
    request.out.mkdir(parents=True, exist_ok=True)
    with hold_folder(request.out):
        state = _open_state(request.out, _identity(request, index, encoder))
        if not state.finished:
            work = _Import(request, index, encoder, state)
            work.run(progress or (lambda done, total: None))
    splits = {
        name: {"documents": split.documents, "tokens": split.tokens, "utf8_bytes": split.utf8_bytes}
        for name, split in state.splits.items()
    }
    added = {"eos_added": state.eos_added, "bos_added": state.bos_added, "empty_documents": state.empty_documents}
    return {"out": str(request.out), "splits": splits, **added}


def _identity(request: MegatronRequest, index: MegatronIndex, encoder: Encoder) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(index.lengths).data)
    digest.update(np.ascontiguousarray(index.document_sequences).data)
    return {
        "bin": str(index.bin_path.absolute()),
        "tokens": index.tokens,
        "index_sha256": digest.hexdigest(),
        "tokenizer": encoder.facts.fingerprint,
        "eos_id": encoder.eos_id,
        "bos_id": encoder.bos_id,
        "source": request.source,
        "domain": request.domain,
        "heldout_fraction": request.heldout_fraction,
        "segment_tokens": request.segment_tokens,
    }


def _open_state(folder: Path, identity: dict[str, Any]) -> _State:
    file = folder / IMPORT_NAME
    if not file.is_file():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name != "writer.lock")
        if foreign:
            raise DataError(f"{folder}: holds {foreign[:5]} but no {IMPORT_NAME}; fix: --out with a new folder")
        state = _State(identity)
        state.save(folder)
        return state
    state = _State(**load_state(file, IMPORT_VERSION, _State))
    changed = sorted(key for key in identity if state.request.get(key) != identity[key])
    if changed:
        raise DataError(
            f"{folder}: holds an import with another {', '.join(changed)}; fix: --out with a new folder, or delete it"
        )
    return state


class _Import:
    def __init__(self, request: MegatronRequest, index: MegatronIndex, encoder: Encoder, state: _State) -> None:
        self.request, self.index, self.encoder, self.state = request, index, encoder, state
        self.count_bytes = byte_counter(request.tokenizer, encoder.vocab_size, self._sample())
        facts = (encoder.vocab_size, encoder.eos_id, encoder.facts, encoder.bos_id)
        self.writers = {
            split: SplitWriter(
                request.out / split, StoreLabel(request.source, request.domain, split, *facts), state.splits[split]
            )
            for split in SPLITS
        }

    def run(self, progress: Progress) -> None:
        in_segment = 0
        try:
            for number, end, tokens in self._documents():
                in_segment += self._add(number, tokens)
                if in_segment >= self.request.segment_tokens:
                    self._finish_segment(number + 1)
                    in_segment = 0
                if end // _PROGRESS_EVERY != (end - len(tokens)) // _PROGRESS_EVERY:
                    progress(end, self.index.tokens)
            if in_segment or not self.state.splits["train"].shards:
                self._finish_segment(self.index.documents)
        finally:
            for writer in self.writers.values():
                writer.close()
        if not any(split.documents for split in self.state.splits.values()):
            raise DataError(f"{self.request.prefix}: no document with tokens among {self.index.documents}")
        for writer in self.writers.values():
            writer.write_manifest()
        self.state.finished = True
        self.state.save(self.request.out)

    def _sample(self) -> list[NDArray[Any]]:
        """The first documents, about half a million tokens; the same ones when a killed import goes on."""
        flat, start = self.index.map_tokens(), 0
        sample: list[NDArray[Any]] = []
        for end in next(self.index.document_ends(), np.empty(0, np.int64)).tolist():
            self._require_known_ids(len(sample), flat[start:end])
            sample.append(self._text_ids(flat[start:end]))
            start = end
            if end > _SAMPLE_TOKENS:
                break
        return sample

    def _text_ids(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """Without BOS and EOS."""
        has_eos = len(tokens) > 0 and tokens[-1] == self.encoder.eos_id
        has_bos = self.encoder.bos_id is not None and len(tokens) > has_eos and tokens[0] == self.encoder.bos_id
        return tokens[int(has_bos) : len(tokens) - int(has_eos)].astype("<u4")

    def _documents(self) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """(number, position behind it, ids) from the first one that is not finished."""
        flat, number = self.index.map_tokens(), self.state.document
        start = self.index.tokens_before(number)
        for ends in self.index.document_ends(number):
            for end in ends.tolist():
                yield number, end, flat[start:end]
                start, number = end, number + 1

    def _add(self, number: int, tokens: NDArray[Any]) -> int:
        """Tokens added. Counts go into the state, which is saved with the segment only."""
        self._require_known_ids(number, tokens)
        eos, bos = self.encoder.eos_id, self.encoder.bos_id
        text_ids = self._text_ids(tokens)
        if not len(text_ids):
            self.state.empty_documents += 1
            return 0
        self.state.eos_added += int(tokens[-1] != eos)
        self.state.bos_added += int(bos is not None and tokens[0] != bos)
        whole = np.concatenate([[] if bos is None else [bos], text_ids, [eos]]).astype(np.uint32)
        split = SPLITS[is_heldout(text_ids.tobytes(), self.request.heldout_fraction)]
        self.writers[split].append(whole, np.array([len(whole)]), utf8_bytes=self.count_bytes(text_ids))
        return len(whole)

    def _require_known_ids(self, number: int, tokens: NDArray[Any]) -> None:
        if len(tokens) and not 0 <= (low := int(tokens.min())) <= (high := int(tokens.max())) < self.encoder.vocab_size:
            raise DataError(
                f"{self.index.bin_path}: document {number} has ids from {low} to {high}, {self.request.tokenizer} has "
                f"{self.encoder.vocab_size}; fix: --tokenizer with the one that made the file"
            )

    def _finish_segment(self, next_document: int) -> None:
        for writer in self.writers.values():
            writer.finish_shard()
        self.state.document = next_document
        self.state.save(self.request.out)
