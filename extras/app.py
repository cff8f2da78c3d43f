"""A page in the browser on which to try a model: a demo with Gradio, in English or Korean.

    pip install "gradio>=6"
    python -m extras.app runs/clip                             # searches the demo's test images
    python -m extras.app runs/clip --images PHOTOS             # a folder of images, or shards

Four tabs: name an image with labels in both languages; search images by words, by an image, or by
an image minus words plus words; compare what a word finds in English and in Korean; the numbers of
the run. Vectors of images are cached, in the same place as by extras.search. Images that are added
to the folder while the page is open are found, too.

The page is served to this computer alone unless --host says otherwise. It loads nothing from other
hosts and reports nothing to anyone.

From top to bottom: the texts of the page, what it computes, the page itself, the command.

Not included: logins and queues for many users.
"""

import argparse
import contextlib
import html
import importlib.metadata
import itertools
import os
import socket
import tempfile
import threading
from pathlib import Path

import torch

import kelip
import page
import shards
from classes import read_classes
from command import ArgumentParser, describe_error, number, one_line, run_command
from demo import DEMO
from evaluate import curves, embed_texts, folder_of, report_tables, zero_shot_weights
from extras import search
from extras.calibrate import language_of, probability, read_calibration
from extras.features import open_cache, update
from tokenizer import read_json

SHOWN, COMPARED = 24, 12  # results of a search, and of each language
SIDE = 88                 # of an image on the page, in pixels

# ---- the texts ----

TEXTS = {
    "en": {
        "name": "Name",
        "search": "Search",
        "compare": "Compare",
        "numbers": "Numbers",
        "about_name": "Which of these labels fits the image? Labels may be in both languages.",
        "about_search": "Words find images. With an image, its vector minus and plus those of "
                        "words is searched for.",
        "about_compare": "The same concept in English and in Korean: which images are nearest, and "
                         "how many are the same?",
        "image": "Image",
        "labels": "Labels, one per line",
        "prompts": "Prompts",
        "about_prompts": "Templates of prompts.json, such as “a photo of a {}”. –: none",
        "probabilities": "If exactly one label is right, which one?",
        "p": "p: does the label describe the image?",
        "words": "Words",
        "minus": "Minus words",
        "english": "English",
        "korean": "Korean",
        "examples": "Examples",
        "go": "Go",
        "images": "{count:,} images of {source}",
        "skipped": "skipped: {counts}",
        "nearest": "The {shown} nearest of {count:,} images, by cosine.",
        "about_p": "p: the probability that the words describe the image, if they describe 1 in "
                   "{odds:,.0f} images.",
        "shared": "{shared} of {shown} images are in both lists",
        "chance": "Two random lists of {count:,} images would share {chance:.2f}.",
        "model": "Model",
        "parameters": "Parameters",
        "encoder_parameters": "{total:,}; image encoder {image:,}, text encoder {text:,}",
        "image_encoder": "Image encoder",
        "image_sizes": "layers: {layers}, width: {width}, image: {size} x {size} pixels, patches: "
                       "{patch} x {patch}",
        "text_encoder": "Text encoder",
        "text_sizes": "layers: {layers}, width: {width}, text: {length} tokens, vocabulary: "
                      "{vocabulary:,}",
        "dimensions": "Dimensions of a vector",
        "scale": "Scale of cosines in the loss",
        "run": "Training",
        "run_sizes": "{steps:,} steps of {batch_size:,} of {pairs:,} pairs",
        "evaluation": "Evaluation on {test}",
        "no_labels": "Drop an image and type labels",
        "no_query": "Type words, or drop an image",
        "no_pair": "Type the concept in both languages",
        "bad_image": "The image cannot be read",
    },
    "ko": {
        "name": "이름",
        "search": "검색",
        "compare": "비교",
        "numbers": "수치",
        "about_name": "어느 라벨이 이미지에 맞을까요? 두 언어를 섞어 써도 됩니다.",
        "about_search": "단어로 이미지를 찾습니다. 이미지를 넣으면 그 벡터에서 단어의 벡터를 "
                        "빼고 더해 찾습니다.",
        "about_compare": "같은 개념을 영어와 한국어로 찾으면 어떤 이미지가 가장 가깝고, "
                         "몇 장이 같을까요?",
        "image": "이미지",
        "labels": "라벨, 한 줄에 하나씩",
        "prompts": "프롬프트",
        "about_prompts": "“{} 사진”과 같은 prompts.json의 틀. –: 없음",
        "probabilities": "라벨 중 꼭 하나가 맞다면 어느 것일까요?",
        "p": "p: 라벨이 이미지를 설명할까요?",
        "words": "단어",
        "minus": "뺄 단어",
        "english": "영어",
        "korean": "한국어",
        "examples": "예시",
        "go": "실행",
        "images": "{source}의 이미지 {count:,}장",
        "skipped": "건너뜀: {counts}",
        "nearest": "이미지 {count:,}장 중 코사인이 가장 높은 {shown}장.",
        "about_p": "p: 단어가 이미지 {odds:,.0f}장 중 1장을 설명한다고 할 때, 이 이미지를 "
                   "설명할 확률.",
        "shared": "{shown}장 중 {shared}장이 두 목록에 모두 있습니다",
        "chance": "이미지 {count:,}장에서 무작위로 뽑은 두 목록은 {chance:.2f}장이 같습니다.",
        "model": "모델",
        "parameters": "매개변수",
        "encoder_parameters": "{total:,}개; 이미지 인코더 {image:,}개, 텍스트 인코더 {text:,}개",
        "image_encoder": "이미지 인코더",
        "image_sizes": "{layers}층, 너비 {width}; {size} x {size} 픽셀, 패치 {patch}",
        "text_encoder": "텍스트 인코더",
        "text_sizes": "{layers}층, 너비 {width}; 토큰 {length}개, 어휘 {vocabulary:,}개",
        "dimensions": "벡터의 차원",
        "scale": "손실에서 코사인에 곱하는 값",
        "run": "학습",
        "run_sizes": "{steps:,}스텝, 배치 {batch_size:,}쌍, 모두 {pairs:,}쌍",
        "evaluation": "{test} 평가",
        "no_labels": "이미지를 넣고 라벨을 입력하세요",
        "no_query": "단어를 입력하거나 이미지를 넣으세요",
        "no_pair": "두 언어 모두로 개념을 입력하세요",
        "bad_image": "이미지를 읽을 수 없습니다",
    },
}
# What the tables and charts of evaluate.py say, which is English.
KOREAN_TERMS = {
    "Training loss by language of the caption": "캡션의 언어별 학습 손실",
    "R@1, image to text, of held-out images, %": "학습하지 않은 이미지의 R@1, 이미지로 텍스트, %",
    "retrieval, %": "검색, %", "image to text": "이미지로 텍스트",
    "text to image": "텍스트로 이미지", "chance ": "우연 ", "mean per class": "클래스 평균",
    "confusions": "혼동", ">images<": ">이미지<", "% of the class": "클래스의 %",
    "English": "영어", "Korean": "한국어", " prompts": " 프롬프트", ">captions": ">캡션",
    " steps": "스텝"}

# Whatever the images are, each example starts from the image nearest to a text.
NAME_EXAMPLES = [
    ("red apple", "red apple\n빨간 사과\ngreen apple\n토마토\nsoccer ball", "–"),
    ("강아지 얼굴", "강아지 얼굴\n고양이 얼굴\nlion\nfox", "–"),
    ("soccer ball", "soccer ball\n농구공\n야구공\ntennis", "emoji groups")]
SEARCH_EXAMPLES = [
    ("rainbow", "rainbow", None, ""), ("웃는 고양이", "웃는 고양이", None, ""),
    ("red apple − 빨간 + 초록", "초록", "red apple", "빨간"),
    ("red heart − red + blue", "blue", "red heart", "red")]
COMPARE_EXAMPLES = [("soccer ball", "축구공"), ("house", "집"), ("rice", "밥"), ("love", "사랑")]


# ---- what the page computes ----

class Demo:
    """A model and the images that it searches.

    The answers are for people: `language`, "en" or "ko", is that of their texts. Raises ValueError
    and OSError with a sentence for the same people.
    """

    def __init__(self, name_or_path, source):
        self.name, self.source, self.folder = name_or_path, source, folder_of(name_or_path)
        pairs = search.open_images(source)  # errors in paths come before the model is opened
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.tokenizer = kelip.build_model(name_or_path, device)
        self.cache = open_cache(name_or_path, self.model)
        self.calibration = read_calibration(self.folder, self.model)
        self.lock, self.shards = threading.Lock(), None
        self._embed(pairs)

    def update(self):
        """Embed what is new since the last time. Returns the images and their rows in the cache."""
        with self.lock:  # two people may ask at the same time
            pairs = search.open_images(self.source)
            if pairs.shards != self.shards:
                self._embed(pairs)
            return self.images, self.rows

    def _embed(self, pairs):
        rows, kept, self.skipped = update(self.model, pairs, self.cache)
        if not kept:
            raise ValueError(f"none of the {len(pairs):,} images decodes: "
                             f"{shards.format_counts(self.skipped)}")
        self.images, self.rows = torch.utils.data.Subset(pairs, kept), rows
        self.shards = pairs.shards

    def status(self, language):
        """A line about the images, after an update."""
        texts, images = TEXTS[language], self.update()[0]
        lines = [texts["images"].format(count=len(images), source=self.source)]
        if self.skipped:
            lines.append(texts["skipped"].format(counts=shards.format_counts(self.skipped)))
        return one_line("; ".join(lines))

    def name_image(self, path, labels, prompts, language):
        """The probabilities of labels, one a line, for an image: {label: softmax}, {label: p}.

        prompts: a set of prompts.json, or "–". p is that of the label itself, without prompts, for
        labels in a language that was calibrated. Without calibration it is None.
        """
        labels = list(dict.fromkeys(line.strip() for line in labels.splitlines() if line.strip()))
        if not path or not labels:
            raise ValueError(TEXTS[language]["no_labels"])
        image = self._image_vector(path, language)                           # [D]
        vectors = embed_texts(self.model, self.tokenizer, labels)            # [C, D]
        cosines = vectors @ image                                            # [C]
        p = None
        if self.calibration:
            p = {label: probability(self.calibration, label, cosine)
                 for label, cosine in zip(labels, cosines.tolist())}
            p = {label: value for label, value in p.items() if value is not None}
        if prompts != "–":
            templates = read_classes(prompts)["templates"]
            weights = [zero_shot_weights(self.model, self.tokenizer, [label],
                                         templates[language_of(label)])
                       for label in labels]
            cosines = torch.cat(weights, dim=1).T @ image                    # [C]
        scale = self.model.logit_scale.detach().exp().cpu()
        return dict(zip(labels, (scale * cosines).softmax(dim=0).tolist())), p

    def _image_vector(self, path, language):
        try:
            return search.image_vector(self.model, path)
        except ValueError as error:
            raise ValueError(f"{TEXTS[language]['bad_image']} ({error})") from None

    def search(self, words, path, minus, language):
        """The images nearest to words, or to an image plus words, minus words, as HTML."""
        words, minus, texts = words.strip(), minus.strip(), TEXTS[language]
        if not words and not path:
            raise ValueError(texts["no_query"])
        like = self._image_vector(path, language) if path else None
        query = search.query_vector(self.model, self.tokenizer, [words] if words else [], like,
                                    [minus] if minus else [])
        images, rows = self.update()
        found = search.nearest(self.cache.cosines(query)[rows], SHOWN)
        terms = [texts["image"]] * bool(path) + [words] * bool(words)
        about = texts["nearest"].format(shown=len(found), count=len(images))
        # Cosines with images, sums and differences are not those that were calibrated.
        calibration = None if path or minus else self.calibration
        if calibration and probability(calibration, words, 0) is not None:
            about += " " + texts["about_p"].format(odds=1 / calibration["prior"])
        return (page.heading(" + ".join(terms) + f" − {minus}" * bool(minus), about)
                + self._cards(images, found, words, calibration))

    def compare(self, english, korean, language):
        """What a concept finds in two languages: how much is shared, and both lists, as HTML."""
        queries, texts = [english.strip(), korean.strip()], TEXTS[language]
        if not all(queries):
            raise ValueError(texts["no_pair"])
        images, rows = self.update()
        found = [search.nearest(self.cache.cosines(query)[rows], COMPARED)
                 for query in embed_texts(self.model, self.tokenizer, queries)]
        shared = {i for _, i in found[0]} & {i for _, i in found[1]}
        shown, count = len(found[0]), len(images)
        summary = page.heading(texts["shared"].format(shared=len(shared), shown=shown),
                               texts["chance"].format(count=count, chance=shown ** 2 / count))
        return summary, *(
            page.heading(query) + self._cards(images, nearest, query, self.calibration, shared)
            for query, nearest in zip(queries, found))

    def _cards(self, images, found, text, calibration=None, marked=()):
        """What search.nearest found for a text, as HTML. Images whose index is marked get a ✓."""
        cards = []
        for cosine, i in found:
            pair, score = images[i], f"{cosine:.3f}"
            p = probability(calibration, text, cosine) if calibration else None
            if p is not None:
                score += f" p\u00a0{100 * p:.0f}\u00a0%"
            captions = list(itertools.chain(*pair.captions.values())) or [pair.key]
            names = [(caption, n == 0 and i in marked) for n, caption in enumerate(captions[:2])]
            image = page.image(shards.decode(pair.image, 2 * SIDE), SIDE, pair.key)
            cards.append(page.card(image, page.names(score, names)))
        return page.cards(cards)

    def numbers(self, language):
        """What the model is, how its run went, and its evaluations, as HTML."""
        texts, config, model = TEXTS[language], self.model.config, self.model
        total, image = kelip.count_parameters(model), kelip.count_parameters(model.visual)
        rows = [
            [texts["parameters"], texts["encoder_parameters"].format(
                total=total, image=image, text=total - image)],
            [texts["image_encoder"], texts["image_sizes"].format(
                layers=config["vision_layers"], width=config["vision_width"],
                size=config["image_resolution"], patch=config["vision_patch_size"])],
            [texts["text_encoder"], texts["text_sizes"].format(
                layers=config["transformer_layers"], width=config["transformer_width"],
                length=config["context_length"], vocabulary=config["vocab_size"])],
            [texts["dimensions"], f"{config['embed_dim']:,}"],
            [texts["scale"], f"{model.logit_scale.exp().item():.1f}"]]
        path = self.folder / "config.json"
        run = read_json(path) if path.is_file() else {}
        if "pairs" in run:  # not in the config.json of released weights
            rows.append([texts["run"], texts["run_sizes"].format(**run)])
        parts = [page.table([texts["model"], self.name], rows)]
        for path in sorted(self.folder.glob("evaluation*.json")):
            found = read_json(path)
            parts.append(page.heading(texts["evaluation"].format(test=", ".join(found["test"]))))
            parts += [page.table(head, rows) for head, rows in report_tables(found)]
        parts = "".join([*parts, *curves(self.folder)])
        for english, korean in KOREAN_TERMS.items():
            if language == "ko":
                parts = parts.replace(english, korean)
        return parts


# ---- the page ----

# The rules of page.py, for what has this class.
STYLE = f"""<style>
.kelip {{ color-scheme: light; --ink: var(--body-text-color); --line: var(--border-color-primary);
  --dim: light-dark(#6b6a65, #9b9a94); --right: light-dark(#0a7d4b, #4cc38a); {page.STYLE} }}
.dark .kelip {{ color-scheme: dark }}
.kelip h2 {{ font-weight: 600; margin: .5rem 0 0 }}
.kelip .cards {{ gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr));
  margin-top: .5rem }}
.kelip .card {{ flex-direction: column; align-items: center; gap: .3rem; padding: .5rem .3rem;
  text-align: center; line-height: 1.3 }}
.kelip .card ol {{ list-style: none; padding: 0; margin: 0; color: var(--dim) }}
.kelip .right::after {{ content: "\\a0✓" }}
.kelip td + td:last-child {{ white-space: normal }}
.kelip td:nth-child(2):last-child, .kelip th:nth-child(2):last-child {{ text-align: left }}
.gradio-container .tab-container button {{ padding: 0 .6rem }}
body {{ word-break: keep-all; overflow-wrap: break-word }}
</style>"""
FONTS = ("system-ui", "Apple SD Gothic Neo", "Noto Sans KR", "Noto Sans CJK KR", "Malgun Gothic",
         "sans-serif")


def import_gradio():
    """The package gradio. Raises ImportError if it is missing or too old."""
    try:
        if int(importlib.metadata.version("gradio").partition(".")[0]) < 6:
            raise ImportError
        import gradio
    except ImportError:
        raise ImportError("the demo page needs the package gradio: pip install 'gradio>=6'"
                          ) from None
    return gradio


def build_page(demo, folder):
    """The page, a gradio.Blocks. folder: where the images of the examples are written."""
    gr = import_gradio()
    text = gr.I18n(**TEXTS)
    progress_bar = gr.Progress(track_tqdm=True)
    sets = read_json(Path(__file__).parents[1] / "prompts.json")

    def answer(compute):
        """An event's function: compute(*inputs, language), in the language of the browser."""
        # The progress bar of embedding shows on the page, as Gradio sees the argument's default.
        def handle(request: gr.Request, progress=progress_bar, *inputs):
            languages = request.headers.get("accept-language", "")
            try:
                return compute(*inputs, "ko" if languages.startswith("ko") else "en")
            except (OSError, ValueError) as error:
                message = html.escape(one_line(describe_error(error)))
                raise gr.Error(message, print_exception=False) from None
        return handle

    def connect(triggers, compute, inputs, outputs, examples, name):
        """Compute outputs from inputs when a trigger fires or an example is clicked.

        examples: {title: values of the inputs}.
        """
        gr.on(triggers, answer(compute), inputs, outputs, api_name=name)
        gr.Examples(list(examples.values()), inputs, outputs, answer(compute), run_on_click=True,
                    cache_examples=False, label=text("examples"), example_labels=list(examples))

    def example_image(words):
        path = Path(folder, f"{words}.png")
        if not path.exists():
            query = search.query_vector(demo.model, demo.tokenizer, [words])
            (_, i), = search.nearest(demo.cache.cosines(query)[demo.rows], 1)
            shards.decode(demo.images[i].image, 512).save(path)
        return str(path)

    def image_input():
        image = gr.Image(type="filepath", show_label=False, height=220, buttons=[],
                         sources=["upload", "clipboard"])
        # The path of the uploaded file itself. Gradio would open it, and fail if it is damaged.
        image.preprocess = lambda file: file and file.path
        return image

    def output():
        """A place for HTML, to be rendered below the examples."""
        return gr.HTML(elem_classes="kelip", apply_default_css=False, render=False)

    with gr.Blocks(title="KELIP", analytics_enabled=False) as blocks:
        gr.Markdown("# KELIP")
        status = gr.Markdown()
        with gr.Tab(text("name")):
            gr.Markdown(text("about_name"))
            with gr.Row():
                with gr.Column():
                    image = image_input()
                    labels = gr.Textbox(label=text("labels"), lines=5)
                    prompts = gr.Dropdown(["–", *sets], value="–",
                                          label=text("prompts"), info=text("about_prompts"))
                    go = gr.Button(text("go"), variant="primary")
                with gr.Column():
                    softmax = gr.Label(label=text("probabilities"), show_heading=False)
                    p = gr.Label(label=text("p"), show_heading=False,
                                 visible=demo.calibration is not None)
            connect([go.click], demo.name_image, [image, labels, prompts], [softmax, p],
                    {words: [example_image(words), *rest] for words, *rest in NAME_EXAMPLES},
                    "name")
        with gr.Tab(text("search")):
            gr.Markdown(text("about_search"))
            with gr.Row():
                with gr.Column():
                    words = gr.Textbox(label=text("words"))
                    minus = gr.Textbox(label=text("minus"))
                    go = gr.Button(text("go"), variant="primary")
                image = image_input()
            results = output()
            examples = {title: [plus, like and example_image(like), subtracted]
                        for title, plus, like, subtracted in SEARCH_EXAMPLES}
            connect([go.click, words.submit, minus.submit], demo.search, [words, image, minus],
                    results, examples, "search")
            results.render()
        with gr.Tab(text("compare")):
            gr.Markdown(text("about_compare"))
            with gr.Row():
                english = gr.Textbox(label=text("english"))
                korean = gr.Textbox(label=text("korean"))
            go = gr.Button(text("go"), variant="primary")
            outputs = [output(), output(), output()]
            connect([go.click, english.submit, korean.submit], demo.compare, [english, korean],
                    outputs, {" · ".join(pair): list(pair) for pair in COMPARE_EXAMPLES},
                    "compare")
            outputs[0].render()
            with gr.Row():
                outputs[1].render()
                outputs[2].render()
        with gr.Tab(text("numbers")):
            numbers = output().render()
        blocks.load(answer(demo.status), None, status, api_name="status")
        blocks.load(answer(demo.numbers), None, numbers, api_name="numbers")
    return blocks


@contextlib.contextmanager
def serve(demo, host="127.0.0.1", port=None):
    """Serve the page while the context lasts: its URL. port: by default 7860, or the next free."""
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        raise OSError(f"--host {host} --port {port or 0}: cannot be listened on: "
                      f"{error.strerror.partition(' (')[0]}") from None
    gr = import_gradio()
    with tempfile.TemporaryDirectory(prefix="kelip-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploaded images
        blocks = build_page(demo, folder)
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, ssr_mode=False,
            prevent_thread_lock=True, enable_monitoring=False, run_history=False, footer_links=[],
            i18n=gr.I18n(**TEXTS), head=STYLE, theme=gr.themes.Default(font=FONTS, font_mono=FONTS))
        try:
            yield url
        finally:
            blocks.close(verbose=False)


# ---- the command ----

def main(argv=None):
    """Open the model and the images, and serve the page until Ctrl-C."""
    parser = ArgumentParser(
        prog="python -m extras.app", description=__doc__.partition("\nFrom top")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of a run or of released weights")
    add("--images", default=f"{DEMO}/test-*.tar", metavar="FOLDER_OR_SHARDS",
        help="a folder of images, with its subfolders, or shards (default: %(default)s)")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other computers use the page "
             "(default: %(default)s)")
    add("--port", type=number(int, 1, 65535), metavar="N",
        help="port to listen on (default: 7860, or the next that is free)")
    args = parser.parse_args(argv)
    import_gradio()
    demo = Demo(args.model, args.images)
    with serve(demo, args.host, args.port) as url:
        print(f"{demo.status('en')}\nopen {url} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    print("ended")


if __name__ == "__main__":
    run_command(main, "vectors are cached; the same command continues from there")
