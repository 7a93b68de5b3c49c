"""Heat maps are in the right place after resizing, crop and EXIF orientation; the matrix and its cosines."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("onnx_ir", reason="explain reads graphs with onnx_ir")

from blip2edge.explanation.attention import AttentionLayer, LayerWeights, layer_weights
from blip2edge.explanation.drawing import HEAT, colours, gates_picture, heat_map, layer_sheet, matrix_picture
from blip2edge.explanation.gates import Gate
from blip2edge.explanation.grid import PatchGrid, view_of
from blip2edge.explanation.queries import QueryComparison
from blip2edge.runtime.images.preprocess import Preprocessing, load_image

GRID = PatchGrid(8, 8, 1, (8, 8))
RAGGED = PatchGrid(7, 7, 1, (9, 9))  # the last pixel of 64 is in no patch
STRETCHED = Preprocessing(size={"height": 64, "width": 64})
CROPPED = Preprocessing(size={"shortest_edge": 72}, crop={"height": 64, "width": 64})
PADDED = Preprocessing(size={"shortest_edge": 48}, crop={"height": 64, "width": 64})
PLAIN = Preprocessing(resize=False, crop={"height": 64, "width": 64})
BLACK = (0, 0, 0)


def marked(width: int, height: int, left: int, top: int, side: int) -> PIL.Image.Image:
    """A black picture with a white square."""
    picture = PIL.Image.new("RGB", (width, height), BLACK)
    picture.paste((255, 255, 255), (left, top, left + side, top + side))
    return picture


def brightest_patch(preprocessing: Preprocessing, picture: PIL.Image.Image, grid: PatchGrid = GRID) -> tuple[int, int]:
    """Row and column of the patch that the model sees brightest."""
    pixels = preprocessing(picture)[0]
    side = int(grid.stride[0])
    pixels = pixels[: grid.rows * side, : grid.columns * side]
    patches = pixels.reshape(grid.rows, side, grid.columns, side).sum(axis=(1, 3))
    row, column = np.unravel_index(int(patches.argmax()), patches.shape)
    return int(row), int(column)


def planted(row: int, column: int, queries: int = 2, grid: PatchGrid = GRID) -> LayerWeights:
    """All attention of the last query on one patch, of the others on the class token."""
    softmax = np.zeros((1, 3, queries, 1 + grid.rows * grid.columns))
    softmax[0, :, :-1, 0] = 1
    softmax[0, :, -1, 1 + row * grid.columns + column] = 1
    return layer_weights(AttentionLayer(0, "softmax"), softmax, softmax.shape[-1], grid.rows, grid.columns)


@pytest.mark.parametrize("preprocessing", [STRETCHED, CROPPED, PADDED, PLAIN], ids=["stretch", "crop", "pad", "plain"])
@pytest.mark.parametrize("size", [(160, 80), (80, 160), (120, 120)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.36, 0.62), (0.62, 0.4)])
@pytest.mark.parametrize("grid", [GRID, RAGGED], ids=["whole", "rest"])
def test_a_patch_lies_where_its_pixels_are(
    preprocessing: Preprocessing, size: tuple[int, int], place: tuple[float, float], grid: PatchGrid
) -> None:
    side = 4
    left, top = (round(share * length - side / 2) for share, length in zip(place, size, strict=True))
    picture = marked(*size, left, top, side)
    row, column = brightest_patch(preprocessing, picture, grid)
    view = view_of(preprocessing, *size, grid)
    edges = view.rectangle(row, column)
    assert edges[0] - side <= left
    assert left + side <= edges[2] + side
    assert edges[1] - side <= top
    assert top + side <= edges[3] + side
    # The heat map of attention to this patch alone has its last colour there, and nowhere else.
    drawn = np.asarray(heat_map(picture, view, planted(row, column, grid=grid).patches[-1]), np.int64)
    hottest = np.abs(drawn - (0.15 * np.asarray(picture, np.int64) + 0.85 * colours(np.ones(1), HEAT)[0])).sum(-1) < 4
    rows, columns = np.nonzero(hottest)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    np.testing.assert_allclose(found, edges, atol=0.51)
    assert hottest.sum() == (found[2] - found[0]) * (found[3] - found[1])


def test_pixels_beyond_the_last_patch_are_dark() -> None:
    """SigLIP so400m has 27 patches of 14 pixels on 384: 6 pixels are in no patch."""
    view = view_of(Preprocessing(size={"height": 384, "width": 384}), 384, 384, PatchGrid(27, 27, 0, (14, 14)))
    assert view.rectangle(26, 26) == (364, 364, 378, 378)
    drawn = np.asarray(heat_map(PIL.Image.new("RGB", (384, 384), (200, 200, 200)), view, np.full((27, 27), 0.1)))
    assert (drawn[378:] == 70).all()
    assert (drawn[:, 378:] == 70).all()
    assert (drawn[:378, :378].max(axis=-1) > 150).all()


def test_what_a_crop_cuts_off_is_dark() -> None:
    picture = PIL.Image.new("RGB", (160, 80), (200, 200, 200))
    view = view_of(CROPPED, *picture.size, GRID)
    drawn = np.asarray(heat_map(picture, view, np.full((8, 8), 0.1)))
    assert (drawn[:, 0] == 70).all()
    assert (drawn[:, -1] == 70).all()
    assert (drawn[20, 60:100].max(axis=-1) > 150).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_turns_picture_and_map_alike(orientation: int) -> None:
    stored, buffer = marked(160, 80, 100, 20, 8), io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(buffer, "PNG", exif=exif)
    upright = load_image(buffer.getvalue())
    assert upright.size == ((80, 160) if orientation > 4 else (160, 80))
    row, column = brightest_patch(STRETCHED, upright)
    left, top, right, bottom = map(round, view_of(STRETCHED, *upright.size, GRID).rectangle(row, column))
    assert np.asarray(upright)[top:bottom, left:right].mean() > 50


def test_a_sheet_has_a_map_for_each_query() -> None:
    picture = marked(40, 20, 0, 0, 4)
    page = np.asarray(layer_sheet(picture, view_of(STRETCHED, 40, 20, GRID), planted(0, 0, queries=3)))
    assert page.shape[1] > 5 * 144  # the picture, the mean and three queries
    hottest = (page == colours(np.ones(1), HEAT)[0]).all(axis=-1)
    assert not hottest.any()  # a share of the picture always remains
    assert len(np.unique(page.reshape(-1, 3), axis=0)) > 10


def test_colours_end_in_the_scales_ends() -> None:
    ends = colours(np.array([-1.0, 0.0, 1.0, 2.0]), ("000000", "ff0000", "ffffff"))
    assert ends.tolist() == [[0, 0, 0], [0, 0, 0], [255, 255, 255], [255, 255, 255]]


def test_similarity_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 4, 16)) + 1  # pictures, queries, width
    tokens[:, 3] = 2 * tokens[:, 1]
    comparison = QueryComparison()
    for one in tokens:
        comparison.add(one)
    found = comparison.result()

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [[np.mean([cosine(p[i], p[j]) for p in tokens]) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(found.matrix, expected)
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    between = [np.mean([cosine(tokens[a, q], tokens[b, q]) for a, b in pairs]) for q in range(4)]
    assert found.between is not None
    np.testing.assert_allclose(found.between, between)
    assert found.most_alike is not None
    assert found.most_alike[:2] == (1, 3)
    assert found.most_alike[2] == pytest.approx(1)
    assert found.mean == pytest.approx(np.mean([expected[i][j] for i in range(4) for j in range(4) if i != j]))


def test_one_query_and_one_picture_have_nothing_to_compare() -> None:
    comparison = QueryComparison()
    comparison.add(np.ones((1, 3)))
    found = comparison.result()
    assert (found.mean, found.most_alike, found.between) == (None, None, None)


def test_the_matrix_and_the_gates_are_drawn() -> None:
    matrix = np.eye(32)
    matrix[2, 5] = matrix[5, 2] = -1
    page = np.asarray(matrix_picture(matrix)).reshape(-1, 3).tolist()
    for colour in ([178, 24, 43], [247, 247, 247], [33, 102, 172]):  # 1, 0 and -1
        assert page.count(colour) > 100
    gates = [Gate(0, 0, 0.5, -0.25, 1), Gate(1, 4, 0.0, 1.0, 1)]
    bars = (np.asarray(gates_picture(gates)) == (59, 91, 219)).all(axis=-1).sum(axis=1)
    lengths = [int(bars[6 + at * 38 + part * 16 + 6]) for at in range(2) for part in range(2)]
    np.testing.assert_allclose(np.array(lengths) / 320, [0.5, 0.25, 0, 1], atol=0.01)
