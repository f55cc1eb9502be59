"""Gold answer | given answer, with known verdicts; what math-verify says where it is read."""

RIGHT = r"""
17 | 17
17 | 017
17 | +17
17 | 17.
17 | 17.0
17 | $17$
17 | \(17\)
17 | $$17$$
17 | x=17
17 | x = 17
17 | \text{17}
17 | \mathrm{17}
17 | 8+9
17 | \frac{34}{2}
17 | {17}
17 | 17\text{ cm}
17 | 17 \text{ apples}
17 | \$17
17 | 17^\circ
17 | 17^{\circ}
17 | \{17\}
17 | \boxed{17}
-3 | -3
-3 | - 3
1000 | 1,000
1000 | 1{,}000
1,000 | 1000
1234567 | 1,234,567
10^6 | 1000000
10^6 | 1,000,000
2^{10} | 1024
2^{-3} | 1/8
10! | 3628800
1/2 | 0.5
1/2 | .5
1/2 | \frac{1}{2}
1/2 | \frac12
1/2 | \dfrac{1}{2}
1/2 | \tfrac 12
1/2 | 2/4
1/2 | 50\%
\frac{1}{2} | \frac{-1}{-2}
-\frac{1}{2} | \frac{-1}{2}
-1/2 | -0.5
7/2 | 3\frac{1}{2}
0.333333 | 1/3
0.10 | 10\%
10\% | 0.1
\frac{\sqrt{3}}{2} | \dfrac{\sqrt{3}}{2}
\frac{\sqrt{3}}{2} | \sqrt{3}/2
\sqrt{12} | 2\sqrt{3}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
\pi/2 | \frac{\pi}{2}
e^{2} | e^2
x^2+2x+1 | (x+1)^2
x^2-1 | (x-1)(x+1)
k(k+1)/2 | \frac{k^2+k}{2}
a+b | b+a
f(x)=2x | 2x
3+4i | 4i+3
\binom{5}{2} | 10
\log_2 8 | 3
\sin(\pi/6) | 1/2
2.5\times 10^3 | 2500
{1,2} | 1,2
1,2 | \{1,2\}
\{1,2\} | 2,1
1, 2, 3 | \{3,1,2\}
\pm 2 | \{2,-2\}
(1,2) | (1, 2)
(1,2) | \left(1,2\right)
(1/2,3) | (0.5,3)
(0,1) | x\in(0,1)
[0,1) | [0, 1)
x>3 | (3,\infty)
(-\infty,2)\cup(3,\infty) | (3,\infty)\cup(-\infty,2)
\emptyset | \{\}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\text{yes} | yes
yes | \text{Yes}
\text{no solution} | \text{no solution}
\text{A} | A
C | \textbf{C}
x=1,y=2 | (1,2)
12:30 | 12:30
2^{2^{2021}}-1 | 2^{2^{2021}}-1
2^{2^{2021}}-1 | 2^{2^{2021}} - 1
"""

RIGHT_UNICODE = [
    ("17", "17\xb0"),
    ("-3", "\u22123"),
    ("2\u03c0", "2\\pi"),
    ("\\infty", "\u221e"),
    ("2.5 \xd7 10^3", "2500"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\u221e,2)\u222a(3,\u221e)"),
    ("\u732b", "\u732b"),
]

WRONG = r"""
17 | 16
17 | -17
17 | 170
17 | 1 7
17 | 17.5
17 | 16.99
17 | 17/2
17 | 17x
17 | x
17 | 6=17
17 | 17=6
17 | 1=2=17
17 | 17,18
17 | \{16,17\}
17 | 17 \text{ or } 18
17 | 18 \text{ or } 17
17 | x\ne 17
17 | x\ge 17
17 | x>16
17 | 16 < x < 18
17 | \text{seventeen}
17 | $16$ or $17$
17 | \frac{17}{0}
17 | \infty
1/2 | 1/3
1/2 | 0.51
1/3 | 0.33
1/2 | -1/2
\sqrt{2} | 1.41
\sqrt{2} | \sqrt{3}
\pi | 3.14
x^2 | x^3
2x | 2y
(1,2) | (2,1)
(1,2) | [1,2]
[0,1) | [0,1]
x>3 | x\ge 3
\infty | -\infty
\{1,2\} | \{1,2,3\}
\{1,2\} | 1
100,200 | 100,300
10\% | 0.2
\text{yes} | \text{no}
\text{yes} | \text{yes or no}
A | B
A | A, B
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\4&3\end{pmatrix}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]
