// An answer as a table or chips, and as fields to correct, both made from the task's JSON Schema.

const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};

function bar(confidence, title) {
  const inner = make("i");
  inner.style.width = `${Math.round(confidence * 100)}%`;
  const shown = make("span", { className: confidence < 0.6 ? "sure low" : "sure", title }, inner);
  return make("small", {}, shown, ` ${confidence.toFixed(2)}`);
}

function cell(value, path, sure, words) {
  const shown = value === null || value === "" ? words.empty : typeof value === "string" ? value : JSON.stringify(value);
  const node = make("td", {}, shown);
  if (sure.has(path)) node.append(bar(sure.get(path), words.sure));
  return node;
}

const isTable = (schema) => schema.type === "array" && schema.items?.type === "object" && schema.items.properties;
const isObject = (schema) => schema.type === "object" && schema.properties;

// The answer, with a bar of confidence at each value. `fields` are {path, value, confidence}.
export function show(answer, schema, fields, words) {
  const sure = new Map(fields.map((field) => [field.path, field.confidence]));
  if (isTable(schema) && Array.isArray(answer)) {
    if (!answer.length) return make("p", {}, words.empty);
    const keys = Object.keys(schema.items.properties);
    const head = make("tr", {}, ...keys.map((key) => make("th", {}, key)));
    const rows = answer.map((item, place) => make("tr", {}, ...keys.map((key) => cell(item[key], `[${place}].${key}`, sure, words))));
    return make("table", {}, head, ...rows);
  }
  if (isObject(schema) && answer && typeof answer === "object") {
    return make("table", {}, ...Object.keys(schema.properties).map((key) => make("tr", {}, make("th", {}, key), cell(answer[key], key, sure, words))));
  }
  if (Array.isArray(answer) && answer.every((item) => typeof item === "string")) {
    if (!answer.length) return make("p", {}, words.empty);
    return make("p", {}, ...answer.map((item, place) => {
      const chip = make("span", { className: "chip" }, item);
      if (sure.has(`[${place}]`)) chip.append(bar(sure.get(`[${place}]`), words.sure));
      return chip;
    }));
  }
  if (typeof answer === "string") {
    const line = make("p", {}, answer);
    if (sure.has("")) line.append(bar(sure.get(""), words.sure));
    return line;
  }
  return make("pre", {}, JSON.stringify(answer, null, 2));
}

function field(value, schema) {
  if (schema.enum) {
    const select = make("select", {}, ...schema.enum.map((one) => make("option", { value: one, selected: one === value }, one)));
    return { node: select, read: () => select.value };
  }
  const plain = schema.type === "string";
  const input = make("input", { value: plain ? value ?? "" : JSON.stringify(value ?? null) });
  return { node: input, read: () => (plain ? input.value : JSON.parse(input.value)) };
}

// Fields to correct `answer` in; returns {node, read}, where read() gives the corrected answer or throws SyntaxError.
export function edit(answer, schema, words) {
  if (isTable(schema)) {
    const keys = Object.keys(schema.items.properties);
    const table = make("table", {}, make("tr", {}, ...keys.map((key) => make("th", {}, key)), make("th")));
    const rows = new Set();
    const add = (item) => {
      const fields = keys.map((key) => field(item[key], schema.items.properties[key]));
      const remove = make("button", { type: "button" }, words.remove);
      const row = make("tr", {}, ...fields.map((one) => make("td", {}, one.node)), make("td", {}, remove));
      const entry = { read: () => Object.fromEntries(keys.map((key, place) => [key, fields[place].read()])) };
      remove.onclick = () => { rows.delete(entry); row.remove(); };
      rows.add(entry);
      table.append(row);
    };
    (Array.isArray(answer) ? answer : []).forEach(add);
    const more = make("button", { type: "button" }, words.add);
    more.onclick = () => add({});
    return { node: make("div", {}, table, more), read: () => [...rows].map((row) => row.read()) };
  }
  if (isObject(schema)) {
    const fields = Object.entries(schema.properties).map(([key, inner]) => [key, field(answer?.[key], inner)]);
    const table = make("table", {}, ...fields.map(([key, one]) => make("tr", {}, make("th", {}, key), make("td", {}, one.node))));
    return { node: table, read: () => Object.fromEntries(fields.map(([key, one]) => [key, one.read()])) };
  }
  if (schema.type === "array" && schema.items?.enum) {
    const boxes = schema.items.enum.map((one) => make("input", { type: "checkbox", value: one, checked: (answer ?? []).includes(one) }));
    return { node: make("p", {}, ...boxes.map((box) => make("label", { className: "chip" }, box, ` ${box.value}`))), read: () => boxes.filter((box) => box.checked).map((box) => box.value) };
  }
  if (schema.type === "string") {
    const one = field(answer, schema);
    return { node: one.node, read: one.read };
  }
  const area = make("textarea", { rows: 8, value: JSON.stringify(answer, null, 2) });
  return { node: make("label", {}, words.fix, area), read: () => JSON.parse(area.value) };
}

export { make };
