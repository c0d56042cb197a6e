//! DeepSeek-V4's format, as its published encoder defines it. Thinking is on unless the request turns it off; effort is
//! high unless it says otherwise. Tool results are parts of a user's turn.

use std::collections::HashMap;

use super::{
    ASSISTANT, BOS, END_THINK, EOS, Message, THINK, ToolCall, USER, dsml, schemas, thinking_of, tools_of,
};
use crate::{ChatInput, Error};

const REMINDER: &str = "<｜latest_reminder｜>";

/// What the model can be asked instead of an answer: `task` of a message, and the token that asks.
const TASKS: [(&str, &str); 6] = [
    ("action", "<｜action｜>"),
    ("query", "<｜query｜>"),
    ("authority", "<｜authority｜>"),
    ("domain", "<｜domain｜>"),
    ("title", "<｜title｜>"),
    ("read_url", "<｜read_url｜>"),
];

/// Messages of one turn of the user: what was typed and what tools answered, in order.
struct Turn {
    message: Message,
    /// Only of a user's turn.
    blocks: Vec<Block>,
}

enum Block {
    Text(String),
    ToolResult { call: String, content: String },
}

pub(super) fn render(mut messages: Vec<Message>, input: &ChatInput) -> Result<String, Error> {
    let thinking = thinking_of(input).unwrap_or(effort_of(input) != Some("none"));
    let tools = tools_of(input);
    if !tools.is_empty() {
        match messages.iter_mut().find(|message| message.role == "system") {
            Some(system) => system.tools = tools,
            None => messages.insert(0, Message { role: "system".to_owned(), tools, ..Message::default() }),
        }
    }
    let keep_reasoning = messages.iter().any(|message| !message.tools.is_empty());
    let mut turns = merge(messages);
    if thinking && !keep_reasoning {
        drop_reasoning(&mut turns);
    }
    let last_user = turns.iter().rposition(|turn| turn.message.is_user());
    let mut prompt = BOS.to_owned();
    if thinking && !turns.is_empty() {
        prompt.push_str(effort(input));
    }
    let style = Style { thinking, keep_reasoning, last_user };
    for at in 0..turns.len() {
        render_turn(&mut prompt, &turns, at, style)?;
    }
    Ok(prompt)
}

/// Joins tool results and what the user types behind them into one turn; results in the order of their calls.
fn merge(messages: Vec<Message>) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    for message in messages {
        let (block, task) = match message.role.as_str() {
            "tool" => {
                let (call, content) = (message.tool_call_id, message.content);
                (Block::ToolResult { call, content }, None)
            }
            "user" => (Block::Text(message.content), message.task),
            _ => {
                turns.push(Turn { message, blocks: Vec::new() });
                continue;
            }
        };
        // A typed text does not join a turn that has a task; a tool's result does.
        let joins = |turn: &&mut Turn| {
            turn.message.role == "user"
                && (turn.message.task.is_none() || matches!(block, Block::ToolResult { .. }))
        };
        match turns.last_mut().filter(joins) {
            Some(turn) => turn.blocks.push(block),
            None => {
                let message = Message { role: "user".to_owned(), at: message.at, task, ..Message::default() };
                turns.push(Turn { message, blocks: vec![block] });
            }
        }
    }
    let mut order: HashMap<String, usize> = HashMap::new();
    for turn in &mut turns {
        if !turn.message.tool_calls.is_empty() {
            let ids = turn.message.tool_calls.iter().map(|ToolCall { id, .. }| id.clone());
            order = ids.enumerate().filter(|(_, id)| !id.is_empty()).map(|(at, id)| (id, at)).collect();
        }
        sort_results(&mut turn.blocks, &order);
    }
    turns
}

/// Results change places among themselves; text stays where it is.
fn sort_results(blocks: &mut Vec<Block>, order: &HashMap<String, usize>) {
    if order.is_empty() {
        return;
    }
    let (mut results, places): (Vec<Block>, Vec<bool>) = {
        let places = blocks.iter().map(|block| matches!(block, Block::ToolResult { .. })).collect();
        let results = blocks.extract_if(.., |block| matches!(block, Block::ToolResult { .. })).collect();
        (results, places)
    };
    results.sort_by_key(|block| match block {
        Block::ToolResult { call, .. } => order.get(call).copied().unwrap_or(0),
        Block::Text(_) => 0,
    });
    let (mut results, mut texts) = (results.into_iter(), std::mem::take(blocks).into_iter());
    blocks.extend(
        places.into_iter().filter_map(|is_result| if is_result { results.next() } else { texts.next() }),
    );
}

/// Removes reasoning before the last user turn, and what developers said there.
fn drop_reasoning(turns: &mut Vec<Turn>) {
    let last_user = turns.iter().rposition(|turn| turn.message.is_user()).unwrap_or(0);
    let mut at = 0;
    turns.retain_mut(|turn| {
        let early = at < last_user;
        at += 1;
        if early && turn.message.role == "assistant" {
            turn.message.reasoning.clear();
        }
        // A developer's words hold for the turn that they open.
        !early || turn.message.role != "developer"
    });
}

#[derive(Clone, Copy)]
struct Style {
    thinking: bool,
    /// Reasoning of earlier turns stays: so it is where tools are at hand.
    keep_reasoning: bool,
    last_user: Option<usize>,
}

fn render_turn(prompt: &mut String, turns: &[Turn], at: usize, style: Style) -> Result<(), Error> {
    let Turn { message, blocks } = &turns[at];
    match message.role.as_str() {
        "system" => {
            prompt.push_str(&message.content);
            prompt.push_str(&message.appendix(tools_text));
        }
        "developer" => {
            if message.content.is_empty() {
                return Err(message.refuse("a developer message needs content"));
            }
            prompt.push_str(USER);
            prompt.push_str(&message.content);
            prompt.push_str(&message.appendix(tools_text));
        }
        "user" => {
            let text = |block: &Block| match block {
                Block::Text(text) => text.clone(),
                Block::ToolResult { content, .. } => format!("<tool_result>{content}</tool_result>"),
            };
            prompt.push_str(USER);
            prompt.push_str(&blocks.iter().map(text).collect::<Vec<_>>().join("\n\n"));
        }
        "latest_reminder" => {
            prompt.push_str(REMINDER);
            prompt.push_str(&message.content);
        }
        "assistant" => {
            let behind = style.last_user.is_none_or(|last| at > last);
            let does_task = at > 0 && turns[at - 1].message.task.is_some();
            if style.thinking && !does_task && (style.keep_reasoning || behind) {
                prompt.push_str(&message.reasoning);
                prompt.push_str(END_THINK);
            }
            prompt.push_str(&message.content);
            if !message.tool_calls.is_empty() {
                prompt.push_str("\n\n");
                prompt.push_str(&dsml(&message.tool_calls, "tool_calls"));
            }
            if !message.is_open {
                prompt.push_str(EOS);
            }
        }
        _ => return Err(message.refuse("unknown role")),
    }
    open_answer(prompt, turns, at, style)
}

/// What stands between a turn and the answer to it, or the end of the prompt.
fn open_answer(prompt: &mut String, turns: &[Turn], at: usize, style: Style) -> Result<(), Error> {
    let next = turns.get(at + 1).map(|turn| turn.message.role.as_str());
    if next.is_some_and(|role| !matches!(role, "assistant" | "latest_reminder")) {
        return Ok(());
    }
    let message = &turns[at].message;
    if let Some(task) = &message.task {
        let known = TASKS.iter().find(|(name, _)| name == task);
        let (_, token) = known.ok_or_else(|| message.refuse(&format!("unknown task {task:?}")))?;
        if task == "action" {
            prompt.push_str(ASSISTANT);
            prompt.push_str(if style.thinking { THINK } else { END_THINK });
        }
        prompt.push_str(token);
        return Ok(());
    }
    let opens = message.is_user() || message.role == "system" && matches!(next, None | Some("assistant"));
    if opens {
        let thinks =
            style.thinking && (style.keep_reasoning || style.last_user.is_none_or(|last| at >= last));
        prompt.push_str(ASSISTANT);
        prompt.push_str(if thinks { THINK } else { END_THINK });
    }
    Ok(())
}

fn effort_of(input: &ChatInput) -> Option<&str> {
    input.kwargs.get("reasoning_effort").and_then(serde_json::Value::as_str)
}

fn effort(input: &ChatInput) -> &'static str {
    match effort_of(input) {
        Some("low" | "minimal") => "",
        Some("max" | "ultra") => {
            "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n\
             You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.\n\
             Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
        }
        _ => {
            "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n\
             You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n\
             Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
        }
    }
}

fn tools_text(tools: &[serde_json::Value]) -> String {
    format!(
        r#"## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"#,
        schemas(tools)
    )
}
