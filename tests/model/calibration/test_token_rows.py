import torch

from model.calibration.token_rows import batches_of, map_rows, sync


def test_batches_cover_all_tokens_in_order_and_hold_documents_of_one_length():
    lengths = [5000, 5000, 300, 300, 300, 20_000, 300, 1]
    documents = [torch.full((length,), place) for place, length in enumerate(lengths)]
    rows_N1 = torch.cat(documents)[:, None]
    batches = list(batches_of(documents))
    assert [(batch.documents, batch.length) for batch in batches] == [
        (1, 5000),
        (1, 5000),
        (3, 300),
        (1, 20_000),
        (1, 300),
        (1, 1),
    ]
    seen = [document for batch in batches for document in batch.of(rows_N1)[:, :, 0]]
    assert len(seen) == len(documents)
    assert all(torch.equal(found, document) for found, document in zip(seen, documents, strict=True))


def test_rows_written_to_a_file_are_there_when_it_is_mapped_again(tmp_path):
    path = tmp_path / "rows.bin"
    rows_ND = map_rows(path, (7, 3), torch.bfloat16)
    written_ND = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows_ND.copy_(written_ND)
    sync(path)
    assert path.stat().st_size == 7 * 3 * 2
    assert torch.equal(map_rows(path, (7, 3), torch.bfloat16), written_ND)
