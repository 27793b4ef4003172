// What the page says, in Chinese and English.
export const WORDS = {
  zh: {
    model: "模型", key: "API 密钥", system: "系统提示", send: "发送", stop: "停止", clear: "清空", temperature: "温度", schema: "答案的格式（JSON Schema）",
    run: "提问", raw: "模型写的原文", right: "✓ 正确", wrong: "✗ 错误", correct: "修改答案", save: "保存修改", chat: "对话", other: "English",
    valid: "符合标注的格式", invalid: "没有符合格式的答案：", sure: "把握", thanks: "已记下，谢谢。", empty: "（空）", stopped: "（已停止）", refused: "（没有答案）",
    figures: (first, all, tokens) => `首字 ${first} ms · 共 ${all} ms${tokens ? ` · ${tokens} 个词元` : ""}`, ms: (all) => `${all} ms`, add: "加一行", remove: "删",
    offline: "连不上服务器：", cut: "（到长度上限为止）", message: "说点什么…", text: "要处理的文本…", fix: "改成正确的 JSON：",
  },
  en: {
    model: "Model", key: "API key", system: "System prompt", send: "Send", stop: "Stop", clear: "Clear", temperature: "Temperature", schema: "Form of the answer (JSON Schema)",
    run: "Ask", raw: "What the model wrote", right: "✓ Right", wrong: "✗ Wrong", correct: "Correct it", save: "Save correction", chat: "Chat", other: "中文",
    valid: "In the labelled form", invalid: "No answer in the form: ", sure: "confidence", thanks: "Noted, thank you.", empty: "(empty)", stopped: "(stopped)", refused: "(no answer)",
    figures: (first, all, tokens) => `first text ${first} ms · ${all} ms in all${tokens ? ` · ${tokens} tokens` : ""}`, ms: (all) => `${all} ms`, add: "Add a row", remove: "Remove",
    offline: "The server cannot be reached: ", cut: "(cut at the limit)", message: "Say something…", text: "The text to work on…", fix: "Make it the right JSON:",
  },
};
