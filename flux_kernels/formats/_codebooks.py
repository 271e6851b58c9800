"""Codebooks of the IQ and FP4 types, stored once and expanded to lookup tables for both decodes.

The numbers are facts of the file formats, read from ggml-common.h of ggml (iq2xxs_grid, iq2xs_grid, iq2s_grid,
iq3xxs_grid, iq3s_grid, iq1s_grid, kvalues_iq4nl, kvalues_mxfp4), which carries this notice:

    MIT License. Copyright (c) 2023-2026 The ggml authors.

    Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
    documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
    rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
    persons to whom the Software is furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
    Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
    WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
    COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
    OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the OCP FP4 value; ggml has no -0.
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Grid:
    """Store a codebook of vectors: each entry is `length` of the `values`.

    An entry packs its value numbers in 16 // length bits each, the first lowest; entries ascend, so `deltas` stores their
    differences as 16-bit little-endian words, deflated, in base64.
    """

    values: tuple[int, ...]
    length: int
    deltas: str

    def table(self) -> Tensor:
        """Expand to uint8 [entries * length], one (signed) byte a value."""
        words = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(self.deltas))), dtype=torch.int16)
        entries = words.to(torch.int64).bitwise_and(0xFFFF).cumsum(0)
        width = 16 // self.length
        numbers = entries[:, None] >> torch.arange(0, 16, width, device="cpu") & (1 << width) - 1
        # Not `values[numbers]`, which would start torch's threads, and a process that imported the library could not be forked.
        values = torch.tensor(self.values, dtype=torch.int8, device="cpu")
        return values.index_select(0, numbers.flatten()).view(torch.uint8)


def value_table(values: tuple[int, ...]) -> Tensor:
    """Make a lookup table of single values: uint8 [len(values)], one signed byte each."""
    return torch.tensor(values, dtype=torch.int8, device="cpu").view(torch.uint8)


def packed_words(values: tuple[int, ...]) -> tuple[int, ...]:
    """Pack signed bytes, the first lowest, four to a signed 32-bit word, for `_tiles.lookup16`."""
    raw = bytes(value & 0xFF for value in values)
    return tuple(int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4))


_IQ2_VALUES = (8, 25, 43)

IQ1_S_GRID = Grid(
    (-1, 0, 1),
    8,
    "eNqNV41u4zYMFmUpdmpff7B1ThNf0wId2u0Oe53emgA9YIfu1q3YM+zNxz/Rkp3shiKNLVEU+ZH8yDjnXYV/3tUuuBa/F/jZuI7XzvBJVlrbe3KguxU+"
    "tW5wEZ+W+Imog9a9e2/nd7PzpLvBt+h6XaGbA/6Xt99BTg4o1aHUCd7ykZ/3fCPgnkj0uBvxDOh6xTrEm96do07xK+3+idIP+N2pVIOrZPvA1ka8+ZCt"
    "8SAKOz3Too4BJQBvk5UHxaY76nuDshuzdNx9iZDprPhuQZa0P6h0YBx85q1gPygWgKsJjei27pQ1Ve7NIrrQM/R+gp+tRWsPdGOriDZ4foP3Acd0xFHO"
    "DhzvYOjXauevlgnzmMham9kImWTP9wDL5lEFRqfK4p8sim6dnanVVrK8svMDrtL7GUp/hciZlfCL2V3eMuECM8WrFwFz2ZvXoz2RsW34nfZI02f3DtH2"
    "7noSnZRjEbW9xDwnBJcyK6a7KdM6tiRqrBJqW5RccIT3fOO0iiPvDbO9HZxplm6LqHpekRvJoi/4TNb1RS6K7K3F32vlU4xafuu0fluOxoYz7cS9HKww"
    "Qjx5/oN+P3PMyNtbvbezGInHpHk3OTV6fKBiL6WW78xTsfkX9jQyr8kN4mXKsErzpc7i31o+SwWJNeB+s0oa0KeK2Su6G9y9wNr6HtE6n2hrNYO8Ilyb"
    "tsZ9cjCrpci8Ob6nLB+znlauDuSs2PzIXNtmURMeTnwIWjmC0RXKCgOLX8/Q8UqLuVgrOsuidrzmYuA8WWh+iMyara8LhvKaUUOGe9L4hrHxFnlC8gPh"
    "GHMeiuZDLPylM9f6nXh+XzCVWEE+SKxLVJONvjhBiIjOPB6PWpViy/UkZmTTjdYzoXHiPgOYDolbKPhRGCaPLBSo9Xgiz0eJO9mRIwtHWbb0bu7t9O5e"
    "YzTdGfPtUdf8hH2nulfG0FD0Kl90kCvNA1kLXJ9pZQcj8oTtEis9ryfxSOyQHE0sfKieOs67b0d9xVXTZHd0yFAB+T5yLwBlCYmlSCytrpdmP9n5JY7M"
    "21n2Jf5cuUvqwxkTdYxJpX0sqN20tsa7G5sTvvL/e84E6ZCN+1Hnl78AFFvBrc+mvmmX3aqcNywST+yzLlthLU45qMoy4r3GP9gsIQg8cW9o+S7Qqs2j"
    "5xlPwsErf3qNacDvgJ5I1C40kg3zTo19d6dIJBbqNWd9xgpSryu+pdUaDIycdz+pxqhsA9z7T/nezj1dTjtNa/2iOzofesuxaFznmYu9RrQ9Oivea/+b"
    "634FmTLfcW1IbD7QdINoLPVU8n/aA0auy2eUU56NR1tlwgnKj4H76hIx2c/6d29zL3WG/gAOqfPkc5e3OrzlSB6blUn+57nO2HHEgO2N1iEo6zdFFyrn"
    "vNoyI9qMmxh6y1Gusn62N7+2E6wqnvi9+859gtSZaH2NTyUPiX7RnTpyw/1iOuM2zDDwP7vQSiObM/zCavpRK4GqeJExU+rt5NeaZ0ngTgJOGGkPF5oD"
    "UacayiCqhBubq54LLMbZeX2AUdK02NtvLqmvZ5yCzg1V4fE764iv8VgmELvN80t4Waz9qEgmO25Zjt7/YOkFd4xvTYp/Q6e/v8Lsl8Xg/pnkQjkRdMV8"
    "Jj3gzaIR2OtgbEjo33H+JPZEhoSSae7/w/czndIHfkrsdY+7r+6Qlnkt/Qtzf1EF",
)

IQ2_XXS_GRID = Grid(
    _IQ2_VALUES,
    8,
    "eNpNkc0rRGEUxn/vHe8Y3800ZkaR6yMpFnfDTJKakkTZSFkow0psJIqampI/YkoxSSkplIUSC1K29la2UsrCRvHcO1fpds+555znPOc554JDRI9DrWyj"
    "fFRvOviOUSffrjhGhsUgZxlgnCQryroUKBk/Gw9xUeG6AlyShTDuo0d8cbY1wVOvy4KxIaYtnDlMkVHuSfBuq3ydwvUG89aC6R71YjoW+43xY6tqljJT"
    "HJDiLVDhkaekyj6XnFtf9QgdYnI4kb2W/wlxKU6F7WHQbJsMm1yY29b/G8do1rzqJutSkle/lcYWcqokKAcaCtK/o+gF41R5LTfMi6OLB6ZZtz5fTHsX"
    "ZIuMscy7NDi6xReznJm48tPqf+Lb+v392mhOvZNUdKMGITe4c+7S/i5ZqdjVzfp55sP8/QuXChPMsKW6y5FxTJP5tP5t21lSdpVHXaybbpqMFznkNTrD"
    "EHuan3FyNVf8AqMtPnA=",
)

IQ2_XS_GRID = Grid(
    _IQ2_VALUES,
    8,
    "eNp9ksFLVGEUxX/fG569ZJgaGceMMZ8mgxHFw8FFbSQTUiQXgY0j6jgutIgkCpyIWeS+dRBCiC1ahrsgCFetWtSf4Npdy3Dh+b55UzPDjAzvzb333Xvu"
    "uede8Ejo53HBvRP6r0cG2/yLenJNtq8vlbacOkpzVpLAISV50RIdcW+fm/RSNed38pQz0hUjzTC7zspyVd+nqZlmNrZLLmYyTiisovMi7ilSVSRgW9GK"
    "fz6LpHIGurKIyCj6LGYbCXXftGdZxTLC3I0rjuRN8tVYz+O2vAneKKvCCUsU/dYpGn1Cp7q1AobYY5Q1zVVyKINieKS50jzgibx3LJtACFn1KUidH8p8"
    "zRU26FG02t994nbtOs/si0GZOv8B29u03sd/bZ47y06/zKYUuivv0DRQLpHio1gX3Ax7nPqdLiiKlbNX4/GdGSEVTeMGQnULxSbQhAEfpMAdyibDLaHP"
    "qTKvmvum5jcYpRjjum5hzOSZZdtk+eu4lFn1nvKNYxYsq/5OFxAJy+IV/+07rZ6f1X9d/jXZpXirCXENuaE7m9HeXvGI98bubdLV57W7nFlTfoo+SjG3"
    "rG6hpr1O80eKVI3PlFPhN1uq+cJlb5FP/GSefenU4/bbyw6HynkofW1slMfuBhf5ZQq81HQ2apVZ4a3sAz1b0vUMx8dLCw==",
)

IQ2_S_GRID = Grid(
    _IQ2_VALUES,
    8,
    "eNqdVc9rE0EU/qZlGjMMDR66dmNI/FFFKoVgQaqIBw9C8FaQtFJY9SAVbclFCqWXCP4H0lvPBW968yDkT/PLzGwys7uzxrLMzM7bN9+8970fCyxhmc8S"
    "GmZe5molaWHfdPsb3l5D8hlWaHYKpxrUs5ja7DXHQYCkiDzXfWiQFVaRiXo7ipZ3ghub3j2+pox42AlselewKJffNvNIlH2Unhc+qkQLiWFKz+S9ALGF"
    "Ea7zfRUr1LiPAQ5lleftErN+vFSt1/HI+n4fcUjjjXa2T9etqM//x2RMw3FaYrmPTQxFGNNe6eRZBVaKJ3hvEBL8kLFY2Xi0aI3i48dIu3t0YJ/CuolQ"
    "m7sdrl3si2LGLeZZQoyx8zHFpfB5fopbzpJv+MIbX2CDmCdrIYt5bNs1taBLGdGM1Etd7PKs1SYfAubFVfNskaxQLkajCkb7uIcDYXM1dn4jejbBJ/c2"
    "kXUVVV8nV8vplF6NxaKnq6wfzzJoIsrfFftHnlkT3vYZd7EvbX8Iu9K/eUrJk+XrFXuxjFjSJ3KXlXqM7zgSU8lrbOOQknWRIVubI9vO0il1Qu11nmpG"
    "thx3Q1O7jZnkZ4nJ3sI8KpzMIjIJKnAXGddnzLE/eMyzD1iRmfTt09Foz1EULt1NH/BG1OfhHr9keEkeL0Qe3Y/0dkD5czGS+R/xmquJXb6d074LrrYn"
    "7ZnZdqQp4gA3WfUpdsRv0cUpfuERvlIj4VjBW9zBXxjUTgg=",
)

IQ3_XXS_GRID = Grid(
    (4, 12, 20, 28, 36, 44, 52, 62),
    4,
    "eNpFkD9Lw1AUxU9CCQkxhhKCUGoMxU1CEHcR1+Lg7kfSkkEnBxUdi3Ry0VKzO4h0F/VzCP7u6x8J7933zjvn3HMj+XwJq6OIPVVX+9TzJZqCx65m6qtZ"
    "slOHmKanQAXswKkzDXWvXRjG9h2+p1I/qjWG7auCfRuuvBfVdJEmDjHsc9071bFGnApS5fhc4zHUO/sA30tte4Vew38ny9rVzHnGS4cDN1njbouUOXtO"
    "HpvtjNXiPyF1D+6FZ2lqvYSrGSu4yTpFRn123XJeSt2Q5FdbpBnh3sdhBlKRsdJDmKHxQTskHcOKUAS60yGsE7ysc6UrL3bu32FN5wZGSZ2BHHE71RSm"
    "zd2A7nhzxyydYgrjCac3NJtey+mLzvZufyAiSak5c32QK9Ejma1fC2r/aKAN7w+/SDdw",
)

IQ3_S_GRID = Grid(
    (1, 3, 5, 7, 9, 11, 13, 15),
    4,
    "eNpNk81u00AUhS8TJ7XbeKw4Lqihjhu2BdFK7BASPB4F2gi6Q6BKwK78lC0sui8SgndgifoKfPd4UqqRM3fuzznn3pmY3WANLFghK7DW2TOLVmIPdA6y"
    "K04De5ryxsrawJORkRFt+S3tUH7H8+wN5TjaCqnFWnJ2v2M6RwQt2KZwntlUiO6N+u3sJdFtPsePQu+wXglhbgtOR1K+ynElp/l/nUGrSD14TaB2Iq3O"
    "v66qSmyV4iM7sDrNJUtKampqmLyvQrkjRUsURNT0U2rF0s/k4zXMzn7iGSj+7WqiDfq8eplfVxmkz3sp0oz686Z4AzMKUtTPf5w4vkjZTNhr8NfEZ3ie"
    "q8cx/a5Yo92016jfwl8pts/vEdGJOKaoXJI5pP4B0fd8fjtTMr7m1ZXC3irTDGvvQ54qTWJHGg4UqXU/Z5pNmXqbaI/M21/EEJZK08jsjbCdr2a19s52"
    "7TxNd2oXeX8nmV5YxdrhjQz1vioh9dFTqXPcmv0WudGOxV6mW7pgvwNiwQSOsWf2BI0Lu8s0h3abSLSzPCaVPV+D/SJ1XtHDY97RRAwj9H2mroCr5eyZ"
    "h9RsE23sB98uVZfqZG6X+erN3rMTOlizR/YJNVF9+ywb9s7+kNvZW3D20fXBHtovav7mrmYLq6FvZzpBzZTMYN91pyPNZkE/e5znYPf/6j37Ddu53edF"
    "/gN3oD85",
)
