"`codetune convert` on files that nobody has looked at."
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from codetune.convert import convert_command

TOKENIZER = Path(__file__).parent/"fixtures"/"tokenizer"/"qwen25"
QA = '{"question": "q%d", "answer": "a%d"}'


def qa(*numbers): return "\n".join(QA % (n, n) for n in numbers)


def run(folder, *flags, out="out.jsonl"):
    "Exit status, report, rows and other records of one conversion."
    out = folder/out
    code = convert_command([str(folder/"raw"), "-o", str(out), *map(str, flags)])
    report = out.with_suffix(".report.json")
    if not report.exists(): return code, None, [], []
    read = lambda p: [json.loads(x) for x in p.read_text(encoding="utf-8").split("\n") if x] if p.exists() else []
    report, rows, rest = json.loads(report.read_text(encoding="utf-8")), read(out), read(out.with_suffix(".rejects.jsonl"))
    t = report["totals"]
    assert t["records"] == t["rows"]+t["duplicates"]+t["contaminated"]+t["rejects"]
    assert (len(rows), len(rest)) == (t["rows"], t["duplicates"]+t["contaminated"]+t["rejects"])
    for f in report["files"]: assert f["records"] == f["rows"]+f["duplicates"]+f["contaminated"]+f["rejects"]
    assert all(r["reason"] and r["source"] and r["kind"] in ("reject", "duplicate", "contaminated") for r in rest)
    return code, report, rows, rest


def put(tmp_path, **files):
    for name, data in files.items():
        path = tmp_path/"raw"/name.replace("__", ".").replace("_S_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


ODD = {  # name: (file, bytes, rows, part of the reason or None)
    "no final newline": ("a.jsonl", qa(1, 2), 2, None),
    "mark and crlf": ("a.jsonl", b"\xef\xbb\xbf"+qa(1, 2).replace("\n", "\r\n").encode(), 2, None),
    "blank lines": ("a.jsonl", "\n\n"+qa(1)+"\n  \n\r\n"+qa(2)+"\n\n", 2, None),
    "unicode line ends": ("a.jsonl", '{"question": "a\u2028b\u0085c\x0c", "answer": "d\u2029"}'.replace("\x0c", "\\f"), 1, None),
    "raw tab in a string": ("a.jsonl", '{"question": "a\tb", "answer": "c"}', 1, None),
    "NaN beside": ("a.jsonl", '{"question": "a", "answer": "b", "score": NaN, "x": Infinity}', 1, None),
    "NaN as answer": ("a.jsonl", qa(1)+'\n{"question": "a", "answer": NaN}', 1, "float"),
    "null answer": ("a.jsonl", qa(1)+'\n{"question": "a", "answer": null}', 1, "questions only"),
    "huge integer beside": ("a.jsonl", '{"question": "a", "answer": "b", "id": 123456789012345678901234567890}', 1, None),
    "lone surrogate": ("a.jsonl", qa(1)+'\n{"question": "\\ud83d", "answer": "b"}', 1, "surrogate"),
    "pair of surrogates": ("a.jsonl", '{"question": "\\ud83d\\ude00", "answer": "b"}', 1, None),
    "not UTF-8": ("a.jsonl", qa(1).encode()+b'\n{"question": "\xb0\xa1", "answer": "b"}\n'+qa(2).encode(), 2, "UTF-8"),
    "cut line": ("a.jsonl", qa(1)+'\n{"question": "x", "ans\n'+qa(2), 2, "broken JSON"),
    "two objects on a line": ("a.jsonl", qa(1)+"\n"+qa(2)+qa(3), 1, "broken JSON"),
    "scalars": ("a.jsonl", qa(1)+'\n3\n', 1, "is an object or a list"),
    "string record": ("a.jsonl", qa(1)+'\n"text"', 1, "is an object or a list"),
    "empty object": ("a.jsonl", qa(1)+'\n{}', 1, "no known columns"),
    "empty list": ("a.jsonl", qa(1)+'\n[]', 1, "empty"),
    "deep": ("a.jsonl", qa(1)+"\n"+"["*200_000, 1, "deep"),
    "nul byte": ("a.jsonl", qa(1)+"\n\x00\x00", 1, "broken JSON"),
    "array": ("a.json", "["+qa(1, 2).replace("\n", ",\n")+"]", 2, None),
    "trailing comma": ("a.json", "["+qa(1, 2).replace("\n", ",")+",]", 2, None),
    "cut array": ("a.json", "["+qa(1, 2).replace("\n", ",")+',{"question": "x"', 2, "broken JSON"),
    "broken inside": ("a.json", "["+QA % (1, 1)+',\n{"question": oops, "answer": "x"},\n'+QA % (2, 2)+"]", 2, "broken JSON"),
    "one object": ("a.json", json.dumps({"question": "a", "answer": "b"}, indent=2), 1, None),
    "lines in .json": ("a.json", qa(1, 2, 3), 3, None),
    "indented array in .jsonl": ("a.jsonl", json.dumps([json.loads(QA % (n, n)) for n in (1, 2)], indent=2), 2, None),
    "array of messages": ("a.json", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', 1, None),
    "array of lists": ("a.json", '[[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]', 1, None),
    "csv": ("a.csv", '\ufeffQuestion,Answer\r\n"two\r\nlines, ""quoted""",한글\r\n', 1, None),
    "csv too wide": ("a.csv", "question,answer\na,b\nc,d,e\n", 1, "3 cells for 2 columns"),
    "csv only head": ("a.csv", "question,answer\n", 0, None),
    "tsv": ("a.tsv", "prompt\tcompletion\na\tb\n", 1, None),
    "gz": ("a.jsonl.gz", gzip.compress(qa(1, 2).encode()), 2, None),
    "gz cut": ("a.jsonl.gz", gzip.compress((qa(*range(9000))+"\n").encode())[:-20], None, "damaged"),
    "gz false": ("a.jsonl.gz", qa(1).encode(), 0, "damaged"),
    "zst": ("a.json.zst", zstandard.compress(("["+qa(1)+"]").encode()), 1, None),
    "zst cut": ("a.jsonl.zst", zstandard.compress(os.urandom(9000).hex().encode())[:-9], 0, "damaged"),
    "parquet false": ("a.parquet", b"PAR1 nothing", 0, "damaged"),
    "utf-16": ("a.json", qa(1).encode("utf-16"), 0, "UTF-16"),
    "empty": ("a.jsonl", b"", 0, None),
    "only a mark": ("a.json", b"\xef\xbb\xbf", 0, None),
    "role in capitals": ("a.jsonl", '{"Messages": [{"Role": "USER", "Content": "a"}, {"ROLE": " Assistant ", "content": "b"}]}', 1, None),
    "unknown role": ("a.jsonl", qa(1)+'\n{"messages": [{"role": "wizard", "content": "a"}]}', 1, "wizard"),
    "no role": ("a.jsonl", qa(1)+'\n{"messages": [{"content": "a"}]}', 1, "message 1 has no role"),
    "leading assistant": ("a.jsonl", qa(1)+'\n{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', 1, "begins with"),
    "no user": ("a.jsonl", qa(1)+'\n{"messages": [{"role": "system", "content": "a"}]}', 1, "no user"),
    "messages not a list": ("a.jsonl", qa(1)+'\n{"messages": "hello"}', 1, "not JSON"),
    "picture": ("a.jsonl", qa(1)+'\n{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 1, "image_url"),
    "arguments are no JSON": ("a.jsonl", qa(1)+'\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x("}}]}]}', 1, "not JSON"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files(tmp_path, case, capsys):
    name, data, rows, reason = ODD[case]
    put(tmp_path, **{name.replace(".", "__"): data})
    code, report, out, rest = run(tmp_path)
    if rows is not None: assert len(out) == rows, rest
    else: assert out
    reasons = [r["reason"] for r in rest]
    if reason: assert len(rest) == 1 and reason in reasons[0], reasons
    else: assert not rest, reasons
    assert code == (3 if reason else 0 if out else 1)


def test_texts_are_kept_letter_by_letter(tmp_path):
    text = " a\u2028b\u0085c\t\r\n 한글 e\u0301 👩‍👩‍👧 <|im_end|> "
    put(tmp_path, a__jsonl=json.dumps({"question": text, "answer": text}), b__csv='question,answer\n"x\r\ny",z\n')
    _, _, rows, _ = run(tmp_path)
    assert [m["content"] for m in rows[0]["messages"]] == [text, text]
    assert rows[1]["messages"][0]["content"] == "x\r\ny"


def test_tool_arguments_in_every_wrapping(tmp_path):
    big = 123456789012345678901234567890
    args = {"x": [1, big], "y": "한글", "z": 1.5}
    lines = []
    for form in (args, json.dumps(args), json.dumps(json.dumps(args))):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": form}}
        lines.append({"messages": [{"role": "user", "content": f"q{len(lines)}"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                                   {"role": "tool", "content": "r"}, {"role": "tool", "content": "s"}, {"role": "assistant", "content": "a"}]})
    lines.append({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps({"name": "f", "arguments": args})},
                                    {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}], "tools": json.dumps([{"name": "f"}])})
    put(tmp_path, a__jsonl="\n".join(map(json.dumps, lines)))
    code, _, rows, _ = run(tmp_path)
    assert code == 0 and len(rows) == 4
    for row in rows: assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": args}
    assert rows[3]["tools"] == [{"name": "f"}]


def test_parquet_with_structs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    (tmp_path/"raw").mkdir()
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b", "tool_calls": None}], "n": 1.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"raw"/"a.parquet")
    code, _, out, _ = run(tmp_path)
    assert code == 0 and out[0]["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_korean_columns(tmp_path):
    put(tmp_path, a__csv="번호,질문,답\n1,안녕,네\n", b__jsonl='{"질문": "뭐", "답": "응"}\n'+qa(1))
    code, _, rows, _ = run(tmp_path, "--map", "input=질문,output=답")
    assert code == 0 and [m["content"] for r in rows for m in r["messages"]] == ["안녕", "네", "뭐", "응", "q1", "a1"]


def test_a_file_without_answers_is_refused_as_a_whole(tmp_path, capsys):
    put(tmp_path, a__jsonl="\n".join(json.dumps({"text": f"t{i}", "meta": i}) for i in range(30)), b__jsonl=qa(1),
        c__jsonl="\n".join(json.dumps({"question_id": i, "turns": ["a", "b"]}) for i in range(5)))
    code, report, rows, rest = run(tmp_path)
    assert code == 3 and len(rows) == 1 and report["totals"]["records"] == 36
    assert [bool(f["refused"]) for f in report["files"]] == [True, False, True]
    assert len({r["reason"] for r in rest if r["source"].startswith("a.jsonl")}) == 1
    assert "refused: a.jsonl: text only" in capsys.readouterr().out


def test_duplicates_across_files_and_shapes(tmp_path):
    put(tmp_path, a__jsonl=qa(1, 1, 2), b__csv="question,answer\nq1,a1\nq3,a3\n")
    _, report, rows, rest = run(tmp_path)
    assert report["totals"]["duplicates"] == 2 and [r["source"] for r in rest] == ["a.jsonl:2", "b.csv:2"]
    text = "Explain in a few words how a list differs from a tuple and when you would take which one of the two "
    put(tmp_path, c__jsonl="\n".join(json.dumps({"question": text+x, "answer": " ".join(f"word{i}" for i in range(60))}) for x in ("now", "please")))
    assert run(tmp_path)[1]["totals"]["duplicates"] == 2
    assert run(tmp_path, "--near-dup")[1]["totals"]["duplicates"] == 3


def test_benchmark_tasks_are_kept_out(tmp_path):
    from codetune.tasks import select_tasks
    test, train = (select_tasks("mini", split=s)[0] for s in ("test", "train"))
    leak = [json.dumps({"question": t["instruct_prompt"], "answer": t["canonical_solution"]}) for t in (*test, *train)]
    own = [dict(task_id="own/1", instruct_prompt="Paint every second fence post of the long street green and count the brushes that you need.", test="")]
    (tmp_path/"own.json").write_text(json.dumps(own))
    put(tmp_path, a__jsonl="\n".join([*leak, json.dumps({"question": own[0]["instruct_prompt"], "answer": "x"})]))
    for mode, rows in (("test", test), ("all", [*test, *train]), ("none", [])):
        _, report, _, rest = run(tmp_path, "--decontaminate", mode)
        assert report["totals"]["contaminated"] == len(rows)
        assert [r["source"] for r in rest if r["kind"] == "contaminated"] == [f"a.jsonl:{n}" for n in range(1, len(rows)+1)]
    _, report, _, rest = run(tmp_path, "--decontaminate-with", tmp_path/"own.json")
    assert report["totals"]["contaminated"] == len(test)+1 and "own/1" in rest[-1]["reason"]
    assert report["decontamination"]["tasks"] == 164+len(test)+1


def test_same_bytes_for_any_block_size(tmp_path):
    "Several blocks at each size, records and characters of three and four bytes across their borders, something broken in each file."
    from codetune.chatml_tokenize import token_options, tokenize_files
    from codetune.data_formats import convert_files, make_options
    from codetune.readers import read_blocks
    rows = [{"question": f"{n} 질문 👩‍👩‍👧 "+"é한"*(n % 97), "answer": "답 "*(n % 61)+str(n)} for n in range(2500)]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    put(tmp_path, a__jsonl="\n".join([*lines[:900], '{"question":', *lines[850:900]]), b__json="["+",\n".join(lines[900:1700])+', {"question": oops},\n'+lines[0]+"]",
        c__csv="question,answer\n"+"".join(f'"{r["question"]}\nx",{r["answer"]}\n' for r in rows[1700:])+"a,b,c\n")
    files = sorted((tmp_path/"raw").iterdir())
    assert all(f.stat().st_size > 200_000 for f in files)
    seen, tokens = set(), token_options(str(TOKENIZER), max_len=9999)
    for size in (5, 1001, 4096, 65536):
        assert all(len(list(read_blocks(f, block=size))) > 3 for f in files)
        out = tmp_path/f"{size}.jsonl"
        report = convert_files(files, [f.name for f in files], out, make_options(decontaminate="none", block_mb=size/2**20) | dict(workers=1))
        assert report["totals"] == dict(records=2554, rows=2500, duplicates=51, contaminated=0, rejects=3)
        tokenize_files([out], [out.stem], tmp_path/f"t{size}.jsonl", tokens | dict(block=size))
        seen.add(tuple((tmp_path/f"{p}{size}{s}").read_bytes() for p in ("", "t") for s in (".jsonl", ".rejects.jsonl")))
    assert len(seen) == 1


def test_same_bytes_for_any_number_of_workers(tmp_path):
    put(tmp_path, a__jsonl="\n".join([qa(*range(1500)), '{"question":', qa(*range(50))]), b__json="["+qa(*range(1490, 2000)).replace("\n", ",")+"]")
    seen = set()
    for n in (1, 2, 4):
        run(tmp_path, "--workers", n, out=f"{n}.jsonl"); run(tmp_path, "-t", "-m", TOKENIZER, "--workers", n, out=f"t{n}.jsonl")
        seen.add(tuple((tmp_path/f"{p}{n}{s}").read_bytes() for p in ("", "t") for s in (".jsonl", ".rejects.jsonl")))
    assert len(seen) == 1


def test_tokenized_rows_and_their_rejects(tmp_path, capsys):
    put(tmp_path, sub_S_a__jsonl=qa(1)+"\n"+json.dumps({"question": "q", "answer": "long "*500})+"\n{", b__csv="question,answer\nq1,a1\n")
    code, report, rows, rest = run(tmp_path, "-t", "-m", TOKENIZER, "--max_len", 100)
    assert code == 3 and report["totals"] == dict(records=4, rows=1, duplicates=1, contaminated=0, rejects=2)
    assert set(rows[0]) == {"input_ids", "label"} and len(rows[0]["input_ids"]) == len(rows[0]["label"])
    assert any(r["source"] == "sub/a.jsonl:2" and "more than max_len 100" in r["reason"] for r in rest)
    manifest = json.loads((tmp_path/"out.jsonl.manifest.json").read_text())
    assert manifest["tokens"] == len(rows[0]["input_ids"]) and 0 < manifest["label_share"] < 1 and manifest["vocab_size"] > 0
    assert run(tmp_path, "-t", "-m", TOKENIZER, "--max_len", 100, "--truncation", "right")[1]["totals"]["rows"] == 2
    assert "4 records in = " in capsys.readouterr().out


def test_parquet_output(tmp_path):
    import pyarrow.parquet as pq
    put(tmp_path, a__jsonl=qa(1, 2))
    assert convert_command([str(tmp_path/"raw"), "-t", "-m", str(TOKENIZER), "-o", str(tmp_path/"o.parquet")]) == 0
    run(tmp_path, "-t", "-m", TOKENIZER)
    rows = [json.loads(x) for x in (tmp_path/"out.jsonl").read_text().splitlines()]
    assert pq.read_table(tmp_path/"o.parquet").to_pylist() == rows


def test_default_place_and_earlier_files(tmp_path, monkeypatch, capsys):
    put(tmp_path, a__jsonl=qa(1))
    monkeypatch.chdir(tmp_path)
    for _ in range(2): assert convert_command(["raw", "-t", "-m", str(TOKENIZER)]) == 0
    assert {"sft_train.jsonl", "sft_train.1.jsonl", "sft_train.rejects.jsonl", "sft_train.jsonl.manifest.json", "sft_train.report.json"} <= {p.name for p in Path("processed").iterdir()}
    assert not [p for p in Path("processed").iterdir() if p.name.startswith(".")]
    assert convert_command([".", "-t", "-m", str(TOKENIZER), "-o", "sft_train.jsonl"]) in (0, 3)   # its own output of before is no input
    assert convert_command([".", "-t", "-m", str(TOKENIZER), "-o", "sft_train.jsonl"]) in (0, 3)


def test_old_form(tmp_path, monkeypatch):
    put(tmp_path, a__jsonl=qa(1), sub_S_a__csv="question,answer\nx,y\n")
    monkeypatch.chdir(tmp_path)
    assert convert_command("-input_dir ./raw -output_dir ./raw_converted".split()) == 0
    assert sorted(str(p.relative_to("raw_converted")) for p in Path("raw_converted").rglob("*.jsonl") if "rejects" not in p.name) == ["a.jsonl", "sub/a.jsonl"]
    assert convert_command("-input_dir ./raw -output_dir ./merged -merge".split()) == 0
    assert len((tmp_path/"merged"/"sft_train.jsonl").read_text().splitlines()) == 2


def test_a_killed_run_leaves_nothing_under_its_name(tmp_path):
    put(tmp_path, a__jsonl=qa(*range(150_000)))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    code = "import sys; from codetune.convert import convert_command; sys.exit(convert_command(sys.argv[1:]))"
    for sig in (signal.SIGKILL, signal.SIGTERM):
        p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"raw"), "-o", str(tmp_path/"o"/"x.jsonl"), "--workers", "2"], env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic()+60
        while not (written := [f for f in (tmp_path/"o").glob(".x.jsonl*") if f.stat().st_size] if (tmp_path/"o").exists() else []):
            assert p.poll() is None and time.monotonic() < end
            time.sleep(.01)
        p.send_signal(sig); p.wait(30)
        assert p.returncode != 0 and not [f for f in (tmp_path/"o").iterdir() if not f.name.startswith(".")]
        for f in written: f.unlink(missing_ok=True)


def test_a_line_of_200_mb(tmp_path):
    (tmp_path/"raw").mkdir()
    with (tmp_path/"raw"/"a.jsonl").open("w") as f:
        f.write(qa(1)+"\n"+'{"question": "q", "answer": "')
        for _ in range(200): f.write("x"*2**20)
        f.write('"}\n'+qa(2)+"\n")
    code, _, rows, rest = run(tmp_path)
    assert code == 3 and len(rows) == 2 and rest[0]["source"] == "a.jsonl:2"
    assert rest[0]["reason"] == "record of 200.0 MB is longer than the limit of 32 MB (max_record_mb)"


@pytest.mark.parametrize("flags,say", [(["/no/such"], "does not exist"), ([], "what shall be converted"), (["RAW", "--map", "질문"], "input=Q,output=A"),
                                       (["RAW", "-o", "x.parquet"], "with --tokenize"), (["RAW", "-o", "x.txt"], ".jsonl"),
                                       (["RAW", "-t", "-m", "no/such-model"], "-m embedded"), (["RAW/notes.md"], "holds no .jsonl")])
def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys, flags, say):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.chdir(tmp_path)
    put(tmp_path, a__jsonl=qa(1), notes__md="x")
    assert convert_command([f.replace("RAW", str(tmp_path/"raw")) for f in flags]) == 1
    err = capsys.readouterr().err
    assert say in err and "Traceback" not in err
    assert not (tmp_path/"processed"/"sft_train.jsonl").exists()


def test_show_mask(tmp_path, capsys):
    from codetune.chatml_tokenize import show_mask_command
    put(tmp_path, a__jsonl=qa(1, 2))
    run(tmp_path, "-t", "-m", TOKENIZER)
    capsys.readouterr()
    assert show_mask_command([str(tmp_path/"out.jsonl"), "--row", "2"]) == 0
    assert "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[a2<|im_end|>]]" in capsys.readouterr().out
    assert show_mask_command([str(tmp_path/"raw"/"a.jsonl"), "-m", str(TOKENIZER), "--html", str(tmp_path/"m.html")]) == 0
    assert '<span style="background:#b7e4c7;color:#000">a1&lt;|im_end|&gt;</span>' in (tmp_path/"m.html").read_text()
    assert show_mask_command([str(tmp_path/"out.jsonl"), "--row", "9"]) == 1
    assert "2 rows, no row 9" in capsys.readouterr().err
