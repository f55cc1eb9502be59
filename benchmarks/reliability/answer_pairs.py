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
(0,\infty) | x>0
(-\infty,0] | x\le 0
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
0 | 0
0 | -0
0 | 0.0
0 | \frac{0}{5}
0 | 3-3
5 | 5.000
5 | 05
5 | \boldsymbol{5}
5 | \mathbf{5}
5 | \displaystyle 5
5 | 5 \text{ units}
5 | 5\,\text{m}
5 | n=5
5 | \sqrt{25}
5 | \sqrt[3]{125}
5 | 2+3
5 | \frac{10}{2}
5 | 10/2
5 | |-5|
-7 | -7.0
-7 | -\frac{14}{2}
-7 | 3-10
42 | 42
42 | 6\cdot 7
42 | 6\times 7
42 | (42)
100 | 10^2
100 | 10^{2}
100 | 1.0\times 10^2
2024 | 2,024
2024 | 2024
65536 | 2^{16}
65536 | 4^8
3/4 | 0.75
3/4 | 75\%
3/4 | \frac{6}{8}
3/4 | \frac34
3/4 | \dfrac34
-2/3 | -\frac{2}{3}
-2/3 | \frac{-2}{3}
-2/3 | -\dfrac23
22/7 | 3\frac{1}{7}
0.125 | 1/8
0.125 | \frac18
0.125 | .125
1.5 | \frac{3}{2}
1.5 | 3/2
1.5 | 1.50
\frac{5}{6} | \frac{1}{2}+\frac{1}{3}
\frac{7}{12} | 7/12
\sqrt{2} | 2^{1/2}
\sqrt{2} | \sqrt 2
\sqrt{2} | \frac{2}{\sqrt{2}}
\sqrt{8} | 2\sqrt{2}
\sqrt{50} | 5\sqrt2
2\sqrt{3} | \sqrt{12}
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
\sqrt{3}-1 | -1+\sqrt{3}
1+\sqrt{5} | \sqrt{5}+1
\frac{1+\sqrt{5}}{2} | \frac{\sqrt{5}+1}{2}
\pi | \pi
2\pi | 2 \pi
2\pi | \pi\cdot 2
\pi^2/6 | \frac{\pi^2}{6}
\frac{\pi}{4} | \pi/4
\frac{\pi}{4} | 0.25\pi
e | e
\ln 2 | \ln(2)
\ln 2 | \ln{2}
2\ln 3 | \ln 9
\log_{10} 100 | 2
\log_2 32 | 5
\cos(\pi) | -1
\tan(\pi/4) | 1
x | x
x+y | y+x
xy | yx
x^2 | x\cdot x
2x+3 | 3+2x
(x+1)(x-1) | x^2-1
x^2+y^2 | y^2+x^2
\frac{x}{2} | x/2
\frac{x}{2} | \frac12 x
\frac{1}{x} | x^{-1}
a^2-b^2 | (a-b)(a+b)
(a+b)^2 | a^2+2ab+b^2
n(n-1)/2 | \frac{n^2-n}{2}
\frac{n(n+1)}{2} | \frac{n^2+n}{2}
2^n | 2^{n}
2^{n+1} | 2\cdot 2^n
n! | n!
3! | 6
5! | 120
\binom{6}{3} | 20
\binom{4}{2} | \frac{4!}{2!2!}
i | i
2i | 2 i
1-i | -i+1
(3,4) | (3,4)
(3,4) | ( 3 , 4 )
(3,4) | (3.0,4.0)
(1,2,3) | (1,2,3)
(\frac12,\frac13) | (1/2,1/3)
\{1,2,3\} | \{3,2,1\}
\{1,2,3\} | 1,2,3
\{-1,1\} | \{1,-1\}
\{-1,1\} | \pm 1
\{0\} | 0
1,-1 | -1,1
[1,2] | [1,2]
[1,2] | \left[1,2\right]
[0,1]\cup[2,3] | [2,3]\cup[0,1]
x\ge 1 | [1,\infty)
x<5 | (-\infty,5)
\text{True} | \text{true}
\text{odd} | odd
\text{even} | \text{Even}
\text{no} | no
\text{B} | B
D | \text{D}
\text{none} | none
\text{Monday} | \text{Monday}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\begin{bmatrix}1&0\\0&1\end{bmatrix} | \begin{pmatrix}1&0\\0&1\end{pmatrix}
45^\circ | 45
45^\circ | 45^{\circ}
90 | 90^\circ
5\% | 0.05
20\% | 20\%
\$5 | 5
1{,}000{,}000 | 10^6
3.14 | 3.14
3.1416 | 3.1416
9.99 | 9.990
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
2/3 | 0.6666667
1/3 | 0.333333333
0.333333 | 1/3
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
0 | 1
0 | 0.01
0 | \emptyset
5 | -5
5 | 5.1
5 | 55
5 | \frac{5}{2}
5 | 5x
5 | \sqrt{5}
5 | 5^2
5 | 5!
5 | \{5,6\}
5 | (5,5)
42 | 24
42 | 4 2
42 | 42.5
-7 | 7
100 | 1000
100 | 10^3
2024 | 2025
3/4 | 4/3
3/4 | 0.7
3/4 | 34
1/2 | 0.25
1/2 | 2
-2/3 | 2/3
\sqrt{2} | 2
\sqrt{2} | -\sqrt{2}
\sqrt{2} | \sqrt[3]{2}
2\sqrt{3} | 3\sqrt{2}
\pi | 2\pi
\pi | \frac{22}{7}
e | \pi
\ln 2 | \log_2 3
x | y
x+1 | x-1
x^2+1 | (x+1)^2
xy | x+y
(a+b)^2 | a^2+b^2
2^n | n^2
n! | n
i | -i
1+i | 1-i
(3,4) | (4,3)
(1,2,3) | (1,2)
\{1,2,3\} | \{1,2,4\}
\{-1,1\} | \{1\}
1,-1 | 1
[1,2] | (1,2)
(0,\infty) | [0,\infty)
(-\infty,0] | (0,\infty)
x<5 | x>5
\text{True} | \text{False}
\text{odd} | \text{even}
\text{A} | \text{B}
\text{B} | \text{A or B}
C | D
45^\circ | 54^\circ
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
3.14 | 3.15
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]
