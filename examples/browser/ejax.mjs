// A folder of `ejax export --format onnx --operators standard`, run by onnxruntime-web.

const TOKEN = 0x9e3779b1, NEXT = 0xc2b2ae35, TYPE = 0x85ebca6b, PAIR = 0x27d4eb2f;
const WHOLE_TOKENS = 4096; // of a text, for exit 0
const FULL = 2; // above every score

/** The buckets of a token and of its pair with the token that follows, as ejax.models.ngrams. */
export function hashed(id, following, type, buckets) {
  const token = (Math.imul(id, TOKEN) + Math.imul(type, TYPE)) | 0;
  const pair = (token + Math.imul(following, NEXT) + PAIR) | 0;
  return [token & (buckets - 1), pair & (buckets - 1)];
}

export class Classifier {
  /**
   * @param ort the module onnxruntime-web
   * @param Tokenizer of @huggingface/tokenizers
   * @param read gives a file of the folder by its name, as an ArrayBuffer
   */
  static async load(ort, Tokenizer, read) {
    const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
    const made = new Classifier();
    made.ort = ort;
    made.meta = await json("exits.json");
    if ((made.meta.problem_type ?? "single_label_classification") !== "single_label_classification")
      throw new Error(`This page shows one label per text. The folder is of ${made.meta.problem_type}.`);
    if (made.meta.runtime?.operators !== "standard")
      throw new Error("The folder must come from `ejax export --format onnx --operators standard`.");
    if (made.meta.provenance?.text_columns?.length === 2)
      throw new Error("This page reads single texts. The folder is of pairs.");
    made.labels = Object.values((await json("config.json")).id2label);
    made.tokenizer = new Tokenizer(await json("tokenizer.json"), {});
    made.zero = made.meta.layers[0] === 0 ? new Ngrams(tensors(await read("ngrams.safetensors")), made) : null;
    made.session = await ort.InferenceSession.create(new Uint8Array(await read("model.onnx")));
    return made;
  }

  /**
   * @param texts strings
   * @param threshold a number, null for the folder's own, above 1 for full depth
   * @returns per text {label, score, exit_layer}; the label is null below the folder's `abstain`
   */
  async classify(texts, threshold = null) {
    const abstain = this.meta.abstain ?? 0;
    return (await this.decide(texts, threshold)).map((found) => (found.score < abstain ? { ...found, label: null } : found));
  }

  async decide(texts, threshold) {
    const { layers, temperatures, thresholds, max_length } = this.meta;
    const levels = layers.map((_, e) => threshold ?? thresholds[e]);
    const ids = texts.map((text) => this.tokenizer.encode(text).ids);
    const zero = this.zero && ids.map((row) => this.zero.logits(cut(row, WHOLE_TOKENS)));
    const answers = texts.map((_, row) => zero && answer(zero[row], temperatures[0], this.labels, 0));
    const stay = answers.flatMap((found, row) => (found && found.score >= levels[0] ? [] : [row]));
    if (!stay.length) return answers;

    const rows = stay.map((row) => cut(ids[row], max_length));
    const B = rows.length, T = Math.max(...rows.map((row) => row.length)), first = zero ? 1 : 0;
    const E = layers.length - first;
    const int32 = (value) => Int32Array.from({ length: B * T }, (_, i) => value(rows[Math.floor(i / T)], i % T));
    const tensor = (type, values, dims) => new this.ort.Tensor(type, values, dims);
    const float = (values, dims) => tensor("float32", Float32Array.from(values), dims);
    const feeds = {
      ids: tensor("int32", int32((row, t) => row[t] ?? 0), [B, T]),
      types: tensor("int32", new Int32Array(B * T), [B, T]),
      mask: tensor("int32", int32((row, t) => (t < row.length ? 1 : 0)), [B, T]),
      thresholds: float(rows.flatMap(() => levels.slice(first)), [B, E]),
      temperatures: float(temperatures.slice(first), [E]),
    };
    if (this.session.inputNames.includes("zero_logits"))
      feeds.zero_logits = float(stay.flatMap((row) => zero[row]), [B, this.labels.length]);
    const { logits, exit } = await this.session.run(feeds);
    const C = this.labels.length;
    stay.forEach((row, i) => {
      const e = Number(exit.data[i]) + first;
      const of = Array.from(logits.data.subarray(i * C, (i + 1) * C));
      answers[row] = answer(of, temperatures[e], this.labels, layers[e]);
    });
    return answers;
  }

  fullDepth(texts) {
    return this.classify(texts, FULL);
  }
}

/** Exit 0: weighted n-grams of the token ids and a linear map. */
class Ngrams {
  constructor({ known, table, bias, kernel }, { meta, labels }) {
    Object.assign(this, { table, bias, kernel, labels, buckets: meta.ngram_buckets });
    this.rank = kernel ? kernel.length / labels.length : labels.length;
    this.place = new Map(Array.from(known, (bucket, i) => [bucket, i]));
  }

  logits(ids) {
    const { rank: R, table, place } = this, sums = new Float64Array(R + 1);
    const add = (bucket) => {
      const at = place.get(bucket);
      if (at !== undefined) for (let r = 0; r <= R; r++) sums[r] += table[at * (R + 1) + r];
    };
    ids.forEach((id, t) => {
      const [token, pair] = hashed(id, ids[t + 1] ?? 0, 0, this.buckets);
      add(token);
      if (t + 1 < ids.length) add(pair);
    });
    const norm = Math.sqrt(Math.max(sums[R], 1e-12)), C = this.labels.length;
    const dot = (c) => {
      if (!this.kernel) return sums[c];
      let sum = 0;
      for (let r = 0; r < R; r++) sum += sums[r] * this.kernel[r * C + c];
      return sum;
    };
    return this.labels.map((_, c) => dot(c) / norm + this.bias[c]);
  }
}

/** At most so many tokens, the last of them the one that ends a text. */
function cut(ids, most) {
  return ids.length <= most ? ids : [...ids.slice(0, most - 1), ids.at(-1)];
}

function answer(logits, temperature, labels, exit_layer) {
  const top = Math.max(...logits);
  const powers = logits.map((x) => Math.exp((x - top) / temperature));
  return {
    label: labels[logits.indexOf(top)],
    score: Math.fround(1 / powers.reduce((a, b) => a + b)),
    exit_layer,
  };
}

/** The tensors of a safetensors file by name, without "ngrams." */
function tensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const kinds = { F32: Float32Array, I32: Int32Array };
  return Object.fromEntries(
    Object.entries(header).filter(([name]) => name !== "__metadata__").map(([name, { dtype, data_offsets: [start, end] }]) => [
      name.replace("ngrams.", ""),
      new kinds[dtype](buffer.slice(8 + size + start, 8 + size + end)),
    ]),
  );
}
